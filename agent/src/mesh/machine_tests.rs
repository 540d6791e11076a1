//! One agent's machine, whose links and peers are made up.

use super::*;
use proptest::{collection::vec, prelude::*};
use prost::Message;
use weft_proto::mesh::Items;

fn mesh(name: &str, now: Instant) -> Mesh {
    let config = Config {
        record: PeerRecord::new(name.parse().unwrap(), Incarnation(1)),
        universe: "10.32.0.0/12".parse().unwrap(),
        identity: None,
        seeds: Vec::new(),
        bootstrap: Vec::new(),
        max_links: 8,
        items: Vec::new(),
        gossipers: Vec::new(),
        seed: 1,
    };
    Mesh::new(config, now)
}

fn open(mesh: &mut Mesh, link: u64, from: &str, now: Instant) {
    let hello = Greeting { name: from.parse().unwrap(), ..mesh.greeting.clone() }.hello();
    mesh.handle(
        Input::Opened { link: LinkId(link), dialled: None, remote: from.into(), certified: None },
        now,
    );
    let frame = Frame { body: Some(Body::Hello(hello)) };
    mesh.handle(Input::Frame { link: LinkId(link), frame }, now);
}

fn outputs(mesh: &mut Mesh) -> Vec<Output> {
    std::iter::from_fn(|| mesh.poll_output()).collect()
}

#[expect(clippy::disallowed_methods, reason = "an instant to count from has no other origin")]
fn start() -> Instant {
    Instant::now()
}

#[test]
fn who_has_nobody_to_join_joins_at_once() {
    let mut mesh = mesh("a", start());
    mesh.handle(Input::Wake, start());
    let outputs = outputs(&mut mesh);
    assert!(outputs.contains(&Output::Joined) && !outputs.contains(&Output::Contact));
}

#[test]
fn who_joined_alone_has_contact_when_somebody_comes_and_has_told_all() {
    let mut mesh = mesh("a", start());
    mesh.handle(Input::Wake, start());
    open(&mut mesh, 1, "b", start());
    assert!(!outputs(&mut mesh).contains(&Output::Contact), "a hello is not all");
    let complete = Body::Items(Items { items: Vec::new(), complete: true });
    for contacts in [1, 0] {
        let frame = Frame { body: Some(complete.clone()) };
        mesh.handle(Input::Frame { link: LinkId(1), frame }, start());
        let told = outputs(&mut mesh);
        assert_eq!(told.iter().filter(|output| **output == Output::Contact).count(), contacts);
    }
}

#[test]
fn who_is_refused_by_all_whom_it_calls_must_not_run_alone() {
    let now = start();
    let address = |port| PeerAddress { host: "192.0.2.1".into(), port };
    let calls = |mesh: &mut Mesh, name: &str, universe: &str, link: u64| {
        let target = Target::Bootstrap(address(6783 + link as u16));
        let (name, universe) = (name.parse().unwrap(), universe.parse().unwrap());
        let hello = Greeting { name, universe, ..mesh.greeting.clone() }.hello();
        let id = LinkId(link);
        mesh.handle(
            Input::Opened { link: id, dialled: Some(target), remote: "192.0.2.1:1".into(), certified: None },
            now,
        );
        mesh.handle(Input::Frame { link: id, frame: Frame { body: Some(Body::Hello(hello)) } }, now);
    };
    let joiner = || {
        let mut mesh = mesh("a", now);
        mesh.dialer = Dialer::new("a".parse().unwrap(), vec![address(6783), address(6784)], 8);
        mesh.handle(Input::Wake, now);
        mesh
    };
    let mut refused = joiner();
    calls(&mut refused, "b", "10.64.0.0/12", 0);
    assert!(!outputs(&mut refused).iter().any(|output| matches!(output, Output::Fatal(_))), "one is left");
    calls(&mut refused, "c", "10.64.0.0/12", 1);
    let fatal = outputs(&mut refused).into_iter().find_map(|output| match output {
        Output::Fatal(why) => Some(why),
        _ => None,
    });
    let why = fatal.unwrap();
    assert!(why.contains("--universe 10.32.0.0/12, not 10.64.0.0/12"), "{why}");

    let mut welcome = joiner();
    calls(&mut welcome, "b", "10.64.0.0/12", 0);
    calls(&mut welcome, "c", "10.32.0.0/12", 1);
    welcome.handle(Input::Wake, now + PATIENCE);
    let outputs = outputs(&mut welcome);
    assert!(outputs.contains(&Output::Joined), "{outputs:?}");
}

#[test]
fn links_are_bounded_and_so_are_those_that_never_say_hello() {
    let now = start();
    let mut mesh = mesh("a", now);
    for n in 0..200 {
        open(&mut mesh, n, &format!("n{n}"), now);
    }
    assert_eq!(mesh.links().len(), 8);
    for n in 200..400 {
        mesh.handle(
            Input::Opened { link: LinkId(n), dialled: None, remote: String::new(), certified: None },
            now,
        );
    }
    assert!(mesh.links().len() <= 8 + super::super::links::STRANGERS);
    mesh.handle(Input::Wake, now + Duration::from_secs(3));
    assert_eq!(mesh.links().len(), 8);
}

#[test]
fn who_only_says_that_the_name_is_taken_is_called_back() {
    let now = start();
    let mut mesh = mesh("a", now);
    mesh.own.endpoints.push("192.0.2.1:6783".parse().unwrap());
    mesh.handle(Input::Wake, now);
    let _ = outputs(&mut mesh);
    let hello = Greeting { incarnation: Incarnation(0), ..mesh.greeting.clone() }.hello();
    let say_hello = |mesh: &mut Mesh, link: u64, dialled: Option<Target>| {
        let remote = "[::ffff:192.0.2.9]:40000".into();
        mesh.handle(Input::Opened { link: LinkId(link), dialled, remote, certified: None }, now);
        let frame = Frame { body: Some(Body::Hello(hello.clone())) };
        mesh.handle(Input::Frame { link: LinkId(link), frame }, now);
        outputs(mesh)
    };
    let addresses = vec!["192.0.2.9:6783".parse().unwrap()];
    let call = Output::Dial { target: Target::Twin, addresses };
    assert!(say_hello(&mut mesh, 1, None).contains(&call));
    assert!(!say_hello(&mut mesh, 2, None).contains(&call), "once is enough");
    assert!(mesh.joined() && mesh.links().is_empty());
    let last = say_hello(&mut mesh, 3, Some(Target::Twin)).pop();
    assert!(matches!(last, Some(Output::Fatal(_))), "{last:?}");
}

#[test]
fn where_a_peer_has_moved_its_new_link_stays_and_else_the_first() {
    let now = start();
    let say = |mesh: &mut Mesh, link: u64, remote: &str, endpoint: &str| {
        let hello = Greeting { name: "b".parse().unwrap(), ..mesh.greeting.clone() }.hello();
        let version = link;
        let record = PeerRecord {
            endpoints: vec![endpoint.parse().unwrap()],
            version,
            ..PeerRecord::new("b".parse().unwrap(), Incarnation(1))
        };
        let (id, items) = (LinkId(link), vec![record.to_item().into()]);
        mesh.handle(Input::Opened { link: id, dialled: None, remote: remote.into(), certified: None }, now);
        mesh.handle(Input::Frame { link: id, frame: Frame { body: Some(Body::Hello(hello)) } }, now);
        let told = Body::Items(Items { items, complete: true });
        assert!(!outputs(mesh).iter().any(|output| matches!(output, Output::Close { .. })), "not yet told");
        mesh.handle(Input::Frame { link: id, frame: Frame { body: Some(told) } }, now);
        outputs(mesh).into_iter().find_map(|output| match output {
            Output::Close { link } => Some(link),
            _ => None,
        })
    };
    for (remote, endpoint, closed) in [
        ("192.0.2.7:4242", "192.0.2.7:6783", Some(LinkId(1))),
        ("192.0.2.7:4242", "192.0.2.2:6783", None),
        ("192.0.2.2:4242", "192.0.2.7:6783", None),
    ] {
        let mut mesh = mesh("z", now);
        mesh.handle(Input::Wake, now);
        let _ = outputs(&mut mesh);
        assert_eq!(say(&mut mesh, 1, "192.0.2.2:4141", "192.0.2.2:6783"), None);
        // The other end decides about doubles that it has called.
        assert_eq!(say(&mut mesh, 2, remote, endpoint), closed, "{remote} {endpoint}");
    }
}

#[test]
fn only_a_real_change_of_the_record_raises_its_version() {
    let mut mesh = mesh("a", start());
    mesh.handle(Input::Wake, start());
    for (mtu, version) in [(0, 1), (1400, 2), (1400, 2), (1300, 3)] {
        mesh.handle(Input::Update(Box::new(move |record| (record.mtu, record.left) = (mtu, true))), start());
        assert_eq!((mesh.peers().own().version, mesh.peers().own().left), (version, false));
    }
}

proptest! {
    #[test]
    fn no_frame_makes_it_panic(kind in 1..7u8, frames in vec(vec(any::<u8>(), 0..100), 1..20)) {
        let now = start();
        let mut mesh = mesh("a", now);
        for (link, bytes) in frames.iter().enumerate() {
            open(&mut mesh, link as u64, "b", now);
            let framed = [&[kind << 3 | 2, bytes.len() as u8], bytes.as_slice()].concat();
            for bytes in [&framed, bytes] {
                if let Ok(frame) = Frame::decode(bytes.as_slice()) {
                    mesh.handle(Input::Frame { link: LinkId(link as u64), frame }, now);
                    prop_assert!(outputs(&mut mesh).len() < 100);
                }
            }
        }
        prop_assert!(mesh.items().count() < 100);
    }
}
