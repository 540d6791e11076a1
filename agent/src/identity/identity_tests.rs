use super::*;
use std::time::Duration;

fn ca() -> (Issued, Ca) {
    let made = Ca::create(SystemTime::now()).unwrap();
    let ca = Ca::load(made.cert.as_bytes(), made.key.as_bytes()).unwrap();
    (made, ca)
}

fn leaf(ca: &Ca, name: &str) -> Issued {
    ca.issue(&name.parse().unwrap(), HOUR, SystemTime::now()).unwrap()
}

fn identity(name: &str, ca: &str, leaf: &Issued, key: &str) -> Result<Identity, String> {
    let trust = Trust::from_pem(ca.as_bytes(), None).map_err(|error| error.to_string())?;
    Identity::new(name.parse().unwrap(), trust, leaf.cert.as_bytes(), key.as_bytes(), SystemTime::now())
        .map_err(|error| error.to_string())
}

#[test]
fn a_certificate_names_its_node_and_is_valid_from_a_while_ago() {
    let (made, ca) = ca();
    for name in ["node-1", "a_b.example", &"x".repeat(253)] {
        let leaf = leaf(&ca, name);
        let identity = identity(name, &made.cert, &leaf, &leaf.key).unwrap();
        let parsed = Certificate::parse(&identity.chain()[0]).unwrap();
        assert_eq!(parsed.names, [name.parse().unwrap()]);
        assert_eq!(parsed.validity.until - parsed.validity.from, 7200);
        assert!(parsed.validity.renew_at() > UnixTime::now().as_secs());
    }
}

#[test]
fn what_peers_would_refuse_is_refused_at_once() {
    let (made, ca) = ca();
    let (other, _) = self::ca();
    let leaf = leaf(&ca, "a");
    let refused = |name: &str, ca: &str, key: &str| identity(name, ca, &leaf, key).unwrap_err();
    assert_eq!(
        refused("b", &made.cert, &leaf.key),
        "the certificate names a, not this node, b; issue one with `weft ca issue b`"
    );
    assert_eq!(refused("a", &made.cert, &made.key), "the private key does not belong to the certificate");
    assert!(refused("a", &other.cert, &leaf.key).contains("is of no CA that this node believes"));
    assert_eq!(refused("a", "", &leaf.key), "there is no certificate in it, in PEM");
    assert_eq!(refused("a", &made.cert, "key"), "there is no private key in it, in PEM");
    let nonsense = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    assert!(refused("a", &made.cert, nonsense).contains("neither ECDSA P-256 nor Ed25519"));
    let late = SystemTime::now() + 2 * HOUR;
    let (cert, key) = (leaf.cert.as_bytes(), leaf.key.as_bytes());
    let ca = Trust::from_pem(made.cert.as_bytes(), None).unwrap();
    let expired = Identity::new("a".parse().unwrap(), ca, cert, key, late).unwrap_err();
    assert!(expired.to_string().contains("has expired"), "{expired}");
}

#[test]
fn a_bundle_believes_each_of_its_cas_and_signs_with_the_one_of_the_key() {
    let ((old, old_ca), (new, new_ca)) = (ca(), ca());
    let both = format!("{}{}", old.cert, new.cert);
    for (ca, key) in [(&old_ca, &old.key), (&new_ca, &new.key)] {
        let leaf = leaf(ca, "a");
        assert!(identity("a", &both, &leaf, &leaf.key).is_ok());
        assert_eq!(identity("a", &both, &leaf, &leaf.key).unwrap().trust().cas(), 2);
        let of_bundle = Ca::load(both.as_bytes(), key.as_bytes()).unwrap();
        let leaf = self::leaf(&of_bundle, "b");
        assert!(identity("b", &both, &leaf, &leaf.key).is_ok());
    }
    let foreign = ca().0.key;
    let refused = Ca::load(both.as_bytes(), foreign.as_bytes()).err().unwrap();
    assert_eq!(refused.to_string(), "ca.key belongs to none of the certificates in ca.crt");
}

#[test]
fn a_chain_that_peers_would_not_take_is_refused() {
    let (made, ca) = ca();
    let mut leaf = leaf(&ca, "a");
    leaf.cert.push_str(&made.cert);
    assert!(identity("a", &made.cert, &leaf, &leaf.key).is_ok());
    leaf.cert.push_str(&made.cert.repeat(3));
    let refused = identity("a", &made.cert, &leaf, &leaf.key).err().unwrap().to_string();
    assert!(refused.contains("too long for signatures: 4 certificates of 3584 bytes"), "{refused}");
}

#[test]
fn keys_are_never_shown() {
    let (made, ca) = ca();
    let leaf = leaf(&ca, "a");
    let identity = identity("a", &made.cert, &leaf, &leaf.key).unwrap();
    let identity = Arc::new(identity);
    let shown = format!("{identity:?} {:?}", task::State { identity: identity.clone(), trouble: None });
    let secret = leaf.key.lines().nth(1).unwrap();
    assert!(
        shown.starts_with("Identity { name: PeerName(\"a\"), validity") && !shown.contains(secret),
        "{shown}"
    );
}

#[test]
fn the_public_key_of_the_data_plane_follows_from_the_secret() {
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    // RFC 7748, §6.1: Bob's keys.
    let secret = hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb");
    let public = data_key(&DataSecret::new(secret.try_into().unwrap()));
    assert_eq!(format!("{public:?}"), "DataKey(de9edb7d…)");
}

const HOUR: Duration = Duration::from_secs(3600);
