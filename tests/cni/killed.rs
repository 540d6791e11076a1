//! A shim that is killed in the middle of ADD, and what the next calls make of what it has left.
//!
//! ```text
//!   weft-cni ──▶ Gate ──▶ agent     the gate holds back the answer to Reserve, or what the shim says after it;
//!      └ kill -9, once it waits     names go over the socket in clear, as protobuf has them
//! ```

use crate::harness::{Harness, Pod, eventually};
use serde_json::json;
use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
};

#[derive(Clone, Copy, PartialEq)]
enum Hold {
    /// The shim does not hear what was reserved.
    Answer,
    /// The agent does not hear that the veth is there.
    Activate,
}

/// A node with a pod, after a shim has been killed in its ADD.
fn killed(hold: Hold) -> (Harness, Pod) {
    let (h, pod) = (Harness::start(), Pod::new("container-1"));
    let held = Arc::new(AtomicBool::new(false));
    let mut conf = h.conf();
    conf["socket"] = json!(gate(&h, &pod, hold, held.clone()));
    let mut command = h.call_for("ADD", &pod, &conf).command();
    command.stdin(Stdio::piped());
    let mut shim = h.node().enter(|| command.spawn().unwrap()).unwrap();
    shim.stdin.take().unwrap().write_all(conf.to_string().as_bytes()).unwrap();
    eventually("the shim waits", || held.load(SeqCst));
    shim.kill().unwrap();
    shim.wait().unwrap();
    let known = h.pods();
    assert_eq!((known.len(), &known[0]["state"]), (1, &json!("reserved")));
    let made = usize::from(hold == Hold::Activate);
    assert_eq!((h.veths().len(), pod.link("eth0").is_some()), (made, made == 1), "it left its veth");
    (h, pod)
}

/// The socket of a gate in front of the agent's.
fn gate(h: &Harness, pod: &Pod, hold: Hold, held: Arc<AtomicBool>) -> PathBuf {
    let (path, agent) = (h.run_dir().join("gate.sock"), h.socket());
    let listener = UnixListener::bind(&path).unwrap();
    let (reserved, activate) = (pod.key().host_interface(), pod.id.clone());
    thread::spawn(move || {
        let (shim, _) = listener.accept().unwrap();
        let agent = UnixStream::connect(agent).unwrap();
        let answered = AtomicBool::new(false);
        let (to_agent, to_shim) = ((&shim, &agent), (&agent, &shim));
        thread::scope(|scope| {
            scope.spawn(|| {
                pass(to_shim, |bytes| {
                    let is_it = contains(bytes, &reserved);
                    answered.fetch_or(is_it, SeqCst);
                    held.fetch_or(is_it && hold == Hold::Answer, SeqCst);
                    !(is_it && hold == Hold::Answer)
                });
            });
            pass(to_agent, |bytes| {
                let late = answered.load(SeqCst);
                held.fetch_or(late && contains(bytes, &activate), SeqCst);
                !late
            });
            let _ = agent.shutdown(Shutdown::Both);
        });
    });
    path
}

/// Passes on what is let through, to the end of the stream.
fn pass((mut from, mut to): (&UnixStream, &UnixStream), mut lets: impl FnMut(&[u8]) -> bool) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if lets(&buffer[..length]) && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// All is as after any ADD, and DEL leaves nothing.
fn works(h: &Harness, pod: &Pod) {
    let added = h.add(pod, &h.conf());
    assert_eq!(added.result()["ips"][0]["address"], "10.32.0.2/32", "what was reserved");
    assert_eq!((h.veths().len(), h.pods().len(), h.pod_routes().len()), (1, 1, 1));
    assert_eq!(h.pods()[0]["state"], "active");
    h.check(pod, &h.conf(), added.result()).silence();
    h.add(pod, &h.conf()).fails_with(102);
    h.del(pod, &h.conf()).silence();
    h.is_clean();
    assert!(pod.link("eth0").is_none());
}

#[test]
fn the_next_add_takes_over_what_was_reserved() {
    let (h, pod) = killed(Hold::Answer);
    works(&h, &pod);
}

#[test]
fn the_next_add_replaces_a_veth_that_was_never_activated() {
    let (h, pod) = killed(Hold::Activate);
    works(&h, &pod);
}

#[test]
fn the_next_add_may_come_with_another_namespace() {
    let (h, old) = killed(Hold::Activate);
    let new = Pod::new(&old.id);
    works(&h, &new);
    assert!(old.link("eth0").is_none());
}

#[test]
fn del_takes_away_what_was_reserved_and_made() {
    for hold in [Hold::Answer, Hold::Activate] {
        let (h, pod) = killed(hold);
        h.del(&pod, &h.conf()).silence();
        h.is_clean();
        assert!(pod.link("eth0").is_none());
        h.del(&pod, &h.conf()).silence();
    }
}

#[test]
fn del_does_so_with_the_agent_down_too() {
    let (h, pod) = killed(Hold::Activate);
    h.kill_agent();
    h.del(&pod, &h.conf()).silence();
    assert_eq!(h.veths(), []);
    h.start_agent();
    eventually("the tombstone is worked off", || h.tombstones().is_empty());
    h.is_clean();
}

/// What the agent finds after a restart is a veth with its address: it is taken for attached, and a DEL takes it away.
#[test]
fn an_agent_that_restarts_meanwhile_does_not_lose_the_address() {
    let (h, pod) = killed(Hold::Activate);
    h.kill_agent();
    h.start_agent();
    assert_eq!(h.pods().len(), 1);
    h.del(&pod, &h.conf()).silence();
    h.is_clean();
}
