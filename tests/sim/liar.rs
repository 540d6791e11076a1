//! A node with a valid certificate that lies: about others' records, and about who owns what.
//!
//! Lies are put straight onto the links of the liar, as a changed agent would.

use crate::{
    ipam::{SECOND, World, name, universe},
    mesh::{all_equal, all_know_all},
};
use prost::Message;
use rand::{RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use weft::{
    identity::Sealer,
    ipam::{seed::SeedPlan, span::Layout, token::Token},
    mesh::{
        gossip::Item,
        machine::Input,
        peers::PeerRecord,
        wire::{self, Frame, frame::Body},
    },
    types::{Incarnation, PeerName, Prefix},
};
use weft_lab::sim::keys::Keys;

/// A network of two seeds and some joiners, in which everybody has space; the seed `node-0` lies.
struct Scene {
    world: World,
    sealer: Sealer,
    ranges: Vec<(Prefix, PeerName)>,
}

const LIAR: usize = 0;
const NODES: usize = 6;

impl Scene {
    fn new(seed: u64) -> Self {
        let keys = Keys::new();
        // Another certificate of the same name is as good as the agent's own.
        let sealer = Sealer::new(keys.of(&name(LIAR)));
        let mut world = World::new(seed, 2, Some(keys));
        world.all_have_space(SECOND * 5);
        for n in 2..NODES {
            world.join(&[n % 2], &SeedPlan::default());
        }
        world.all_have_space(SECOND * 10);
        world.sim.expect("all know all", SECOND * 10, all_know_all);
        world.sim.run(SECOND * 5);
        world.agrees();
        let ranges = world.sim.nodes[1].app.allocator.view().ranges.to_vec();
        Self { world, sealer, ranges }
    }

    /// Has the liar tell everybody.
    fn tell(&mut self, items: Vec<Item>) {
        for n in (0..NODES).filter(|n| *n != LIAR) {
            let items = items.iter().cloned().map(Into::into).collect();
            self.send(n, Body::Items(wire::Items { items, complete: false }));
        }
    }

    /// Puts a frame onto a node's link with the liar.
    fn send(&mut self, to: usize, body: Body) {
        let liar = &self.world.sim.nodes[LIAR].name;
        let links = self.world.sim.nodes[to].mesh.links();
        let link = links.iter().find(|link| link.peer.as_ref().is_some_and(|(peer, _)| peer == liar));
        let (link, frame) = (link.expect("all are linked").id, Frame { body: Some(body) });
        self.world.sim.handle(to, Input::Frame { link, frame });
    }

    /// Nobody believes anything else than before, and all go on to agree.
    fn unmoved(&mut self) {
        self.world.sim.expect("all replicas are equal", SECOND * 20, all_equal);
        self.world.check();
        for n in 0..NODES {
            let node = &mut self.world.sim.nodes[n];
            assert_eq!(*node.app.allocator.view().ranges, self.ranges, "{} believes a lie", node.name);
        }
    }

    fn forged(&self, n: usize) -> u64 {
        self.world.sim.nodes[n].mesh.counters().items_rejected.get("forged").copied().unwrap_or(0)
    }

    /// The token of `owner` as everybody knows it.
    fn token_of(&self, owner: usize) -> Token {
        let owner = &self.world.sim.nodes[owner].name;
        self.tokens().into_iter().find(|token| token.owner == *owner).expect("everybody owns something")
    }

    fn tokens(&self) -> Vec<Token> {
        let items = self.world.sim.nodes[1].mesh.items().filter(|item| item.channel == "ring");
        items.map(|item| Token::from_item(item, &layout()).expect("a token")).collect()
    }

    /// Seals a token as the liar, with a deed of one's choice.
    fn seal(&self, token: Token, grants: Vec<wire::Grant>) -> Item {
        let seal = Some(self.sealer.seal("token", &token.to_body(&layout())));
        Token { signature: wire::Deed { grants, seal }.encode_to_vec(), ..token }.to_item(&layout())
    }
}

fn layout() -> Layout {
    Layout::new(universe())
}

fn grants(token: &Token) -> Vec<wire::Grant> {
    wire::Deed::decode(token.signature.as_slice()).expect("a deed").grants
}

#[test]
fn nobody_speaks_for_another_peer() {
    let mut scene = Scene::new(1);
    let victim = scene.world.sim.nodes[3].name.clone();
    let forged = PeerRecord { mtu: 1, ..PeerRecord::new(victim.clone(), Incarnation(u64::MAX / 4)) };
    let unsealed = forged.to_item();
    let sealed = forged.to_sealed(Some(&scene.sealer));
    let ghost = PeerRecord::new("ghost".parse().unwrap(), Incarnation(1)).to_sealed(Some(&scene.sealer));
    let broken = Item { body: unsealed.body.clone(), ..sealed.clone() };
    scene.tell(vec![unsealed, sealed, ghost, broken]);
    scene.unmoved();
    for n in 1..NODES {
        let mesh = &scene.world.sim.nodes[n].mesh;
        assert_ne!(mesh.peers().get(&victim).unwrap().mtu, 1);
        assert!(mesh.peers().get(&"ghost".parse().unwrap()).is_none());
        assert_eq!(scene.forged(n), 4);
        let named = mesh.refusals(scene.world.sim.now);
        assert!(named.iter().any(|(who, why)| who == "peer node-0" && why.contains("seal")), "{named:?}");
    }
}

#[test]
fn nobody_asks_for_space_in_anothers_name() {
    let mut scene = Scene::new(4);
    let (from, to) = (scene.world.sim.nodes[3].name.to_string(), scene.world.sim.nodes[1].name.to_string());
    let body = wire::SpaceRequest { count: 1 << 18, urgent: true }.encode_to_vec();
    let unsealed =
        wire::Unicast { source: from, destination: to, channel: "ring".into(), body, ..Default::default() };
    let seal = Some(scene.sealer.seal("unicast", &unsealed.encode_to_vec()));
    for seal in [None, seal] {
        let unicast = wire::Unicast { hop_limit: 3, seal, ..unsealed.clone() };
        scene.send(1, Body::Unicast(unicast));
    }
    scene.unmoved();
    assert_eq!(scene.world.sim.nodes[1].mesh.counters().unicasts_dropped["forged"], 2);
}

#[test]
fn nobody_takes_what_was_never_its_own() {
    let mut scene = Scene::new(2);
    let (liar, seed) = (scene.world.sim.nodes[LIAR].name.clone(), scene.token_of(1));
    let mut lies = Vec::new();
    for version in [1, seed.version + 1, 1 << 40] {
        for hands in [seed.hands, seed.hands + 1, 7] {
            let mine = Token { owner: liar.clone(), hands, version, ..seed.clone() };
            lies.push(scene.seal(mine.clone(), Vec::new()));
            lies.push(scene.seal(mine.clone(), grants(&seed)));
            // A hand-over that the giver knows nothing of.
            let taken = Token { hands: seed.hands + 1, version: 0, ..mine.clone() };
            let seal = Some(scene.sealer.seal("token", &taken.to_body(&layout())));
            let grant = wire::Grant { token: taken.to_body(&layout()), seal };
            lies.push(scene.seal(mine.clone(), [grants(&seed), vec![grant]].concat()));
            lies.push(mine.to_item(&layout()));
        }
    }
    // By the right of a share of one's own, but beyond it; and by an epoch that nobody has raised.
    let own = scene.token_of(LIAR);
    let wide =
        Token { start: own.start, end: seed.end.max(own.end), version: own.version + 9, ..own.clone() };
    lies.push(scene.seal(wide, grants(&own)));
    lies.push(scene.seal(Token { epoch: 1, version: 1, ..own.clone() }, grants(&own)));
    lies.push(scene.seal(Token { owner: liar, epoch: 1, ..seed.clone() }, grants(&seed)));
    // Another's range given to who had it before, and by the seals of before.
    let (heir, giver) = (scene.token_of(3), scene.world.sim.nodes[1].name.clone());
    for hands in [heir.hands + 1, heir.hands + 2] {
        let back = Token { owner: giver.clone(), hands, version: 0, ..heir.clone() };
        lies.push(scene.seal(back.clone(), grants(&heir)));
        lies.push(scene.seal(back, Vec::new()));
    }
    // Somebody else's token under another seal.
    let signature = scene.seal(own, Vec::new()).signature;
    lies.push(Token { version: seed.version + 1, signature, ..seed }.to_item(&layout()));
    // What loses to the truth anyway is not even looked at.
    let truth: Vec<Item> = scene.world.sim.nodes[1].mesh.items().cloned().collect();
    let name = |item: &Item| (item.channel.clone(), item.key.clone());
    let wins = |lie: &&Item| truth.iter().all(|item| name(item) != name(lie) || lie.beats(item));
    let count = lies.iter().filter(wins).count();
    assert!(count > lies.len() * 3 / 4, "{count}");
    scene.tell(lies);
    scene.unmoved();
    (1..NODES).for_each(|n| assert_eq!(scene.forged(n), count as u64));
}

#[test]
fn nobody_takes_back_what_it_has_given_away() {
    let mut scene = Scene::new(3);
    let liar = scene.world.sim.nodes[LIAR].name.clone();
    let own = scene.token_of(LIAR);
    let share = scene.tokens().into_iter().filter(|token| token.hands == 1);
    let given: Vec<Token> = share.filter(|token| token.owner != liar).collect();
    assert!(!given.is_empty());
    let mut lies = Vec::new();
    for token in &given {
        for start in [token.start, token.start + layout().unit()] {
            if start > token.end {
                continue;
            }
            // It is still mine.
            let mine = Token { owner: liar.clone(), start, hands: 0, version: 1 << 40, ..token.clone() };
            lies.push(scene.seal(mine.clone(), Vec::new()));
            // I gave it to another.
            let other = scene.world.sim.nodes[1].name.clone();
            let other = Token { owner: other, hands: 1, version: 0, ..mine.clone() };
            lies.push(scene.seal(other, Vec::new()));
            // It has come back to me.
            let back = Token { hands: 2, version: 0, ..mine };
            lies.push(scene.seal(back, Vec::new()));
        }
    }
    let wide = Token { end: layout().whole().last, version: own.version + 1, ..own };
    lies.push(scene.seal(wide, Vec::new()));
    scene.tell(lies);
    scene.unmoved();
    // And who was to be robbed goes on to hand out addresses and space.
    (1..NODES).for_each(|n| assert!(scene.world.attach(n)));
}

#[test]
fn whatever_is_made_of_true_parts_moves_nobody() {
    for seed in 10..20 {
        let mut scene = Scene::new(seed);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let liar = scene.world.sim.nodes[LIAR].name.clone();
        let all = scene.tokens();
        let names: Vec<PeerName> = scene.world.sim.nodes.iter().map(|node| node.name.clone()).collect();
        let not_mine: Vec<&Token> = all.iter().filter(|token| token.owner != liar).collect();
        let mut lies = Vec::new();
        for _ in 0..400 {
            let target = *not_mine.choose(&mut rng).unwrap();
            let blocks = (target.end - target.start + 1) / layout().unit();
            let start = target.start + rng.random_range(0..blocks) * layout().unit();
            let token = Token {
                start,
                owner: names.choose(&mut rng).unwrap().clone(),
                hands: rng.random_range(0..4),
                version: *[0, 1, target.version, 1 << 30].choose(&mut rng).unwrap(),
                free: rng.random(),
                ..target.clone()
            };
            let mut deed = grants(all.choose(&mut rng).unwrap());
            if rng.random_bool(0.3) {
                deed.extend(grants(target));
            }
            if rng.random_bool(0.2) {
                deed.pop();
            }
            lies.push(match rng.random_bool(0.8) {
                true => scene.seal(token, deed),
                false => Token { signature: target.signature.clone(), ..token }.to_item(&layout()),
            });
        }
        scene.tell(lies);
        scene.unmoved();
    }
}

#[test]
fn honest_nodes_with_keys_share_the_addresses_in_rough_weather() {
    let mut world = World::new(21, 3, Some(Keys::new()));
    world.all_have_space(SECOND * 5);
    for n in 3..20 {
        world.join(&[n % 3], &SeedPlan::default());
    }
    world.sim.weather.loss = 0.2;
    world.live(SECOND * 2);
    for n in [1, 7, 12] {
        world.restart(n);
        world.live(SECOND / 4);
    }
    world.sim.weather.groups = vec![(0..9).collect(), (9..20).collect()];
    world.live(SECOND * 3);
    world.sim.weather = crate::net::Weather { loss: 0.0, groups: Vec::new(), ..world.sim.weather.clone() };
    world.live(SECOND * 3);
    world.all_have_space(SECOND * 30);
    world.agrees();
    for node in &world.sim.nodes {
        assert_eq!(node.mesh.counters().items_rejected.get("forged"), None, "{}", node.name);
    }
}
