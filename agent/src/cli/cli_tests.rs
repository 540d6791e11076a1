use super::*;
use crate::admin::{AdminService, LeaveCall, LocalSocket, Snapshot, example};
use insta::assert_snapshot;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tonic::service::Routes;

/// An agent that shows a snapshot, on a socket in a directory of its own.
struct Agent {
    dir: tempfile::TempDir,
    leaving: mpsc::Receiver<LeaveCall>,
}

impl Agent {
    fn start(snapshot: Snapshot) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (leave, leaving) = mpsc::channel(1);
        let admin =
            AdminService::new(Arc::new(move || snapshot.clone()), leave, mpsc::channel(1).0).into_server();
        let socket = LocalSocket::bind(&socket_in(dir.path())).unwrap();
        tokio::spawn(socket.serve(Routes::new(admin), std::future::pending()));
        Self { dir, leaving }
    }

    async fn answers(&self, command: &[&str]) -> Result<String, CliError> {
        answer(self.dir.path(), command).await
    }
}

async fn answer(run_dir: &Path, command: &[&str]) -> Result<String, CliError> {
    let argv = [&["weft"], command, &["--run-dir", run_dir.to_str().unwrap()]].concat();
    let Command::Ask(ask) = Cli::try_parse_from(argv).unwrap().command else { panic!("not a question") };
    ask.answer(Paint { on: false }).await
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn an_empty_variable_is_the_same_as_none() {
    let twin = |value: &str| {
        let value = value.to_owned();
        let command = without_empty_variables(Cli::command(), |_| Some(value.clone().into()));
        let status = command.find_subcommand("status").unwrap();
        status.get_arguments().any(|arg| arg.get_env().is_some())
    };
    assert!(twin("/run/weft") && !twin(""));
}

#[tokio::test]
async fn status_says_how_the_node_is() {
    let agent = Agent::start(example::snapshot());
    assert_snapshot!(agent.answers(&["status"]).await.unwrap(), @r"
node        node-1
ready       yes
peers       2 known, 1 linked
pods        2, MTU 1440
addresses   524,288 owned, 524,283 free, of 10.32.0.0/12
bridge      10.32.0.1
endpoints   192.0.2.1:6783
encryption  off
sent        1,200 packets, 3.0 MiB
received    900 packets, 4.9 KiB
dropped     3 no_peer, 1 too_big
software    weft 0.1.0, up 3h 2m
");
}

#[tokio::test]
async fn status_says_what_is_missing() {
    let mut now = example::snapshot();
    now.not_ready =
        vec!["no addresses yet: asked node-2, node-3".into(), "bridge weft is down: EPERM".into()];
    now.warnings = vec!["table `ip filter` drops forwarded packets".into()];
    now.bridge_address = None;
    now.drops.clear();
    assert_snapshot!(Agent::start(now).answers(&["status"]).await.unwrap(), @r"
node        node-1
ready       no
            - no addresses yet: asked node-2, node-3
            - bridge weft is down: EPERM
warnings    - table `ip filter` drops forwarded packets
peers       2 known, 1 linked
pods        2, MTU 1440
addresses   524,288 owned, 524,283 free, of 10.32.0.0/12
bridge      no address yet
endpoints   192.0.2.1:6783
encryption  off
sent        1,200 packets, 3.0 MiB
received    900 packets, 4.9 KiB
dropped     none
software    weft 0.1.0, up 3h 2m
");
}

#[tokio::test]
async fn peers_are_listed() {
    let agent = Agent::start(example::snapshot());
    assert_snapshot!(agent.answers(&["peers"]).await.unwrap(), @r"
NAME                PATH                          RTT  LOSS   MTU  LINK  ADDRESSES     SENT  RECEIVED  ENDPOINTS           SOFTWARE
node-1 (this node)  local                                    1440          524,288                     192.0.2.1:6783      weft 0.1.0
node-2              direct                     0.2 ms  12 %  1440  up      262,144  3.0 MiB   4.9 KiB  192.0.2.2:6783      weft 0.1.0
node-3              down: no answer, no relay                1440  none    262,144      0 B       0 B  [2001:db8::3]:6783  weft 0.1.0
");
}

#[tokio::test]
async fn ranges_are_listed() {
    let agent = Agent::start(example::snapshot());
    assert_snapshot!(agent.answers(&["ipam"]).await.unwrap(), @r"
universe 10.32.0.0/12, 1,048,576 addresses

PREFIX        OWNER               ADDRESSES   SHARE  ALLOCATED  RESTING
10.32.0.0/13  node-1 (this node)    524,288  50.0 %          3        1
10.40.0.0/14  node-2                262,144  25.0 %
10.44.0.0/14  node-3                262,144  25.0 %
");
}

#[tokio::test]
async fn a_node_without_addresses_says_what_it_waits_for() {
    let mut now = example::snapshot();
    now.ranges.clear();
    now.waiting_for = Some("a peer to give it some; none is reachable".into());
    assert_snapshot!(Agent::start(now).answers(&["ipam"]).await.unwrap(), @r"
universe 10.32.0.0/12, 1,048,576 addresses
this node owns no addresses yet: waiting for a peer to give it some; none is reachable
");
}

#[tokio::test]
async fn pods_are_listed() {
    let mut now = example::snapshot();
    let agent = Agent::start(now.clone());
    assert_snapshot!(agent.answers(&["pods"]).await.unwrap(), @r"
NAMESPACE  NAME   ADDRESS    STATE     INTERFACE       CONTAINER
default    web-0  10.32.0.2  active    wfedd686a15533  4f3c9a0b11d2/eth0
default    web-1  10.32.0.3  reserved  wf873bd5224c21  88aa/eth0
");
    now.pods.clear();
    assert_eq!(Agent::start(now).answers(&["pods"]).await.unwrap(), "no pods on this node\n");
}

#[tokio::test]
async fn json_has_stable_names() {
    let agent = Agent::start(example::snapshot());
    let text = agent.answers(&["report", "--json"]).await.unwrap();
    let mut report: serde_json::Value = serde_json::from_str(&text).unwrap();
    report["kernel"] = "Linux 6.18.0 x86_64".into();
    assert_snapshot!(serde_json::to_string_pretty(&report).unwrap(), @r#"
{
  "ipam": {
    "ranges": [
      {
        "allocated": 3,
        "mine": true,
        "owner": "node-1",
        "prefix": "10.32.0.0/13",
        "resting": 1
      },
      {
        "allocated": null,
        "mine": false,
        "owner": "node-2",
        "prefix": "10.40.0.0/14",
        "resting": null
      },
      {
        "allocated": null,
        "mine": false,
        "owner": "node-3",
        "prefix": "10.44.0.0/14",
        "resting": null
      }
    ],
    "universe": "10.32.0.0/12",
    "waiting_for": null
  },
  "kernel": "Linux 6.18.0 x86_64",
  "peers": [
    {
      "addresses": 524288,
      "bytes_received": 0,
      "bytes_sent": 0,
      "endpoints": [
        "192.0.2.1:6783"
      ],
      "linked": false,
      "loss": null,
      "me": true,
      "mtu": 1440,
      "name": "node-1",
      "packets_received": 0,
      "packets_sent": 0,
      "path": "local",
      "rtt_us": null,
      "software": "weft 0.1.0",
      "via": null,
      "why": null
    },
    {
      "addresses": 262144,
      "bytes_received": 5000,
      "bytes_sent": 3145728,
      "endpoints": [
        "192.0.2.2:6783"
      ],
      "linked": true,
      "loss": 0.125,
      "me": false,
      "mtu": 1440,
      "name": "node-2",
      "packets_received": 900,
      "packets_sent": 1200,
      "path": "direct",
      "rtt_us": 234,
      "software": "weft 0.1.0",
      "via": null,
      "why": null
    },
    {
      "addresses": 262144,
      "bytes_received": 0,
      "bytes_sent": 0,
      "endpoints": [
        "[2001:db8::3]:6783"
      ],
      "linked": false,
      "loss": null,
      "me": false,
      "mtu": 1440,
      "name": "node-3",
      "packets_received": 0,
      "packets_sent": 0,
      "path": "down",
      "rtt_us": null,
      "software": "weft 0.1.0",
      "via": null,
      "why": "no answer, no relay"
    }
  ],
  "pods": [
    {
      "addresses": [
        "10.32.0.2"
      ],
      "container_id": "4f3c9a0b11d2",
      "host_interface": "wfedd686a15533",
      "ifname": "eth0",
      "name": "web-0",
      "namespace": "default",
      "state": "active",
      "uid": "7d1c"
    },
    {
      "addresses": [
        "10.32.0.3"
      ],
      "container_id": "88aa",
      "host_interface": "wf873bd5224c21",
      "ifname": "eth0",
      "name": "web-1",
      "namespace": "default",
      "state": "reserved",
      "uid": "7d1c"
    }
  ],
  "software": "weft 0.1.0",
  "status": {
    "addresses_free": 524283,
    "addresses_owned": 524288,
    "bridge_address": "10.32.0.1",
    "counters": {
      "bytes_received": 5000,
      "bytes_sent": 3145728,
      "drops/no_peer": 3,
      "drops/too_big": 1,
      "gossip/items_received": 40,
      "gossip/items_rejected": 0,
      "packets_received": 900,
      "packets_sent": 1200,
      "repairs": 1
    },
    "encryption": "off",
    "endpoints": [
      "192.0.2.1:6783"
    ],
    "incarnation": 1763683200000000,
    "links": 1,
    "mtu": 1440,
    "name": "node-1",
    "not_ready": [],
    "peers": 2,
    "pods": 2,
    "ready": true,
    "software": "weft 0.1.0",
    "universe": "10.32.0.0/12",
    "uptime_seconds": 10925,
    "warnings": []
  }
}
"#);
    for (command, part) in [("peers", "peers"), ("pods", "pods")] {
        let alone: serde_json::Value =
            serde_json::from_str(&agent.answers(&[command, "--json"]).await.unwrap()).unwrap();
        assert_eq!(alone[part], report[part]);
    }
    for part in ["status", "ipam"] {
        let alone: serde_json::Value =
            serde_json::from_str(&agent.answers(&[part, "--json"]).await.unwrap()).unwrap();
        assert_eq!(alone, report[part]);
    }
}

#[tokio::test]
async fn a_report_has_all_sections() {
    let text = Agent::start(example::snapshot()).answers(&["report"]).await.unwrap();
    for section in
        ["kernel      Linux ", "== status ==", "== peers ==", "== ipam ==", "== pods ==", "drops/no_peer"]
    {
        assert!(text.contains(section), "{section}\n{text}");
    }
}

#[tokio::test]
async fn without_an_agent_the_message_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = socket_in(dir.path());
    let expected = format!(
        "no agent answers on {}: is it running? start it with `systemctl start weft` or `weft agent`, or say with --run-dir where it is",
        socket.display()
    );
    assert_eq!(answer(dir.path(), &["status"]).await.unwrap_err().to_string(), expected);
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert_eq!(answer(dir.path(), &["peers"]).await.unwrap_err().to_string(), expected);
}

#[tokio::test]
async fn leaving_is_passed_on_and_answered() {
    let mut agent = Agent::start(example::snapshot());
    let socket = socket_in(agent.dir.path());
    let mut client = Client::connect(&socket).await.unwrap();
    let (reply, ()) = tokio::join!(client.leave(false), async {
        agent.leaving.recv().await.unwrap().done.send(Ok(Some("node-2".parse().unwrap()))).unwrap();
    });
    assert_eq!(reply.unwrap().heir, "node-2");
    let (reply, ()) = tokio::join!(client.leave(false), async {
        agent.leaving.recv().await.unwrap().done.send(Err("it has pods".into())).unwrap();
    });
    let refused = format!("the agent on {} refused: it has pods", socket.display());
    assert_eq!(reply.unwrap_err().to_string(), refused);
}

#[tokio::test]
async fn an_agent_that_hangs_up_is_told_from_none() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::UnixListener::bind(socket_in(dir.path())).unwrap();
    tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
        }
    });
    let error = answer(dir.path(), &["status"]).await.unwrap_err();
    assert!(matches!(error, CliError::Call(CallError::Closed(_))), "{error}");
}

#[tokio::test]
async fn an_idle_caller_does_not_hold_up_the_shutdown() {
    let dir = tempfile::tempdir().unwrap();
    let socket = LocalSocket::bind(&socket_in(dir.path())).unwrap();
    let admin =
        AdminService::new(Arc::new(example::snapshot), mpsc::channel(1).0, mpsc::channel(1).0).into_server();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(socket.serve(Routes::new(admin), async { drop(stopped.await) }));
    let mut client = Client::connect(&socket_in(dir.path())).await.unwrap();
    client.status().await.unwrap();
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), served).await.unwrap().unwrap().unwrap();
}
