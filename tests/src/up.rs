//! `cargo lab up`, `exec`, `down`: a lab that stays, to look around in.
//!
//! `up` starts a keeper process in a session of its own, which holds the lab's mounts and namespaces until it is told
//! to end, and says on its standard output how far it is; `exec` finds it by `lab.json` and moves into its namespaces.
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{SigSet, Signal},
    unistd::{Pid, setsid},
};
use serde::{Deserialize, Serialize};

use crate::{
    Lab,
    binaries::Binaries,
    claim::{self, Taken},
    lab::check_root,
    leaks,
    process::Process,
    progress::Progress,
    sandbox::{Doors, NETNS_DIR},
    tools::{self, Purpose},
    wait,
};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[arg(long, default_value_t = 3)]
    nodes: usize,
    /// Pods on each node
    #[arg(long, default_value_t = 2)]
    pods: usize,
    /// Namespaces and underlay only: no agents, and pods that are not attached
    #[arg(long)]
    bare: bool,
    /// Run the agents with CAP_NET_ADMIN as their only capability, on a read-only file system
    #[arg(long)]
    user_caps: bool,
    /// Only name the programs that are missing, and fail
    #[arg(long)]
    no_install: bool,
}

/// What `exec` and `down` have to know of the lab.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    /// "pid start" of the keeper.
    keeper: String,
    /// The thread that is in the lab's mounts.
    thread: i32,
    binaries: Option<PathBuf>,
    places: Vec<Facility>,
}

/// A place that one can be in.
#[derive(Debug, Serialize, Deserialize)]
struct Facility {
    /// As given to `exec`.
    name: String,
    /// The namespace's file in the lab's `/var/run/netns`.
    netns: String,
    inode: u64,
    address: Option<String>,
    run_dir: Option<PathBuf>,
    state_dir: Option<PathBuf>,
}

/// Starts a keeper and returns when the lab is ready.
pub fn up(options: &Options) -> anyhow::Result<()> {
    check_root()?;
    if facts().is_ok_and(|facts| facts.keeper().is_some_and(|keeper| keeper.runs())) {
        bail!("a lab is up already; `cargo lab down` takes it down");
    }
    tools::ensure_present(Purpose::Demo, !options.no_install)?;
    let mut command = Command::new(env::current_exe().context("find this program")?);
    command.args(["keep", "--nodes", &options.nodes.to_string(), "--pods", &options.pods.to_string()]);
    if options.bare {
        command.arg("--bare");
    } else {
        command.env("WEFT_BIN_DIR", Binaries::get()?.directory());
    }
    if options.user_caps {
        command.arg("--user-caps");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).current_dir("/");
    let mut keeper = command.spawn().context("start the keeper")?;
    let progress = Progress::visible();
    let mut last = String::new();
    for line in BufReader::new(keeper.stdout.take().expect("stdout is a pipe")).lines() {
        last = line?;
        if last == READY {
            drop(progress);
            return show();
        }
        match last.strip_prefix(FAILED) {
            Some(why) => bail!("{why}"),
            None => progress.step(&last),
        }
    }
    let status = keeper.wait()?;
    bail!("the keeper ended, {status}, after `{last}`")
}

/// The keeper itself: says what it does on standard output, then `ready`, then waits for SIGTERM.
pub fn keep(options: &Options) -> anyhow::Result<()> {
    setsid().context("leave the terminal")?;
    // Blocked in all threads that start from here on, it waits until it is asked for below.
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block()?;
    let outcome = start(options).and_then(|lab| {
        writeln!(std::io::stdout(), "{READY}")?;
        end.wait()?;
        lab.finish()
    });
    if let Err(error) = &outcome {
        // Nobody may read any more.
        let _ = writeln!(std::io::stdout(), "{FAILED}{}", format!("{error:#}").replace('\n', " "));
    }
    outcome
}

/// Runs a command inside, in place of this program.
pub fn exec(place: &str, command: &[String]) -> anyhow::Result<()> {
    check_root()?;
    let facts = facts()?;
    let keeper = facts.keeper().filter(Process::runs).context(NONE_UP)?;
    let found = facts.places.iter().find(|it| it.name == place).with_context(|| {
        let names: Vec<_> = facts.places.iter().map(|place| place.name.as_str()).collect();
        format!("the lab has no `{place}`, but {}", names.join(", "))
    })?;
    let (program, arguments) = command.split_first().context("name a command after `--`")?;
    let here = env::current_dir();
    let doors = Doors::of(keeper.pid, Pid::from_raw(facts.thread)).context("find the lab's mounts")?;
    doors.enter().context("enter the lab's mounts")?;
    let netns = File::open(Path::new(NETNS_DIR).join(&found.netns))
        .with_context(|| format!("open the network namespace of {place}"))?;
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {place}"))?;
    if let Ok(here) = here {
        // The same directory, if the lab's mounts have it.
        let _ = env::set_current_dir(here);
    }
    let mut command = Command::new(program);
    command.args(arguments).env("PATH", path(&facts)?);
    if let (Some(run), Some(state)) = (&found.run_dir, &found.state_dir) {
        command.env("WEFT_RUN_DIR", run).env("WEFT_STATE_DIR", state);
    }
    Err(command.exec()).with_context(|| format!("run {program} in {place}"))
}

/// Ends the lab and waits until it is gone.
pub fn down() -> anyhow::Result<()> {
    check_root()?;
    let keeper = match facts().ok().and_then(|facts| Some((facts.keeper()?, facts))) {
        Some((keeper, facts)) if keeper.runs() => {
            let inodes = facts.places.iter().map(|place| place.inode).collect();
            let agents = claim_processes();
            for leak in leaks::processes_in(&inodes) {
                if let leaks::Leak::Process { pid, .. } = &leak
                    && !agents.iter().any(|agent| agent.pid.as_raw() == *pid)
                {
                    eprintln!("{leak} is inside and keeps its namespace until it ends");
                }
            }
            keeper
        }
        _ => {
            claim::sweep()?;
            bail!(NONE_UP);
        }
    };
    keeper.signal(Signal::SIGTERM).context("ask the keeper to end")?;
    let ended = wait::until("the keeper ends", Duration::from_secs(15), || {
        ensure!(!keeper.runs(), "process {} still runs", keeper.pid);
        Ok(())
    });
    if ended.is_err() {
        keeper.signal(Signal::SIGKILL).context("end the keeper")?;
    }
    claim::sweep()?;
    ended
}

fn start(options: &Options) -> anyhow::Result<Lab> {
    let mut builder =
        Lab::builder().nodes(options.nodes).pods(options.pods).name(NAME).progress(Progress::Output);
    builder = builder.confined(options.user_caps);
    if options.bare {
        builder = builder.without_agents();
    }
    let lab = builder.start_named().map_err(|error| match error {
        Taken::Up(_) => anyhow::anyhow!("a lab is up already; `cargo lab down` takes it down"),
        Taken::Other(error) => error,
    })?;
    let facts = serde_json::to_vec(&Facts::of(&lab, options)?)?;
    // Whole or not at all: `exec` may look at any moment.
    let (new, file) = (lab.claim().run_dir().join("lab.json.new"), lab.claim().run_dir().join(FILE));
    fs::write(&new, facts).and_then(|()| fs::rename(&new, &file)).context("note what is in the lab")?;
    Ok(lab)
}

/// Tells what is there and what one can do with it.
fn show() -> anyhow::Result<()> {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(["place", "address"]);
    for place in facts()?.places {
        table.add_row([place.name, place.address.unwrap_or_default()]);
    }
    println!("{table}\n\ncargo lab exec n1 -- weft status\ncargo lab exec n1/p1 -- bash\ncargo lab down");
    Ok(())
}

impl Facts {
    fn of(lab: &Lab, options: &Options) -> anyhow::Result<Self> {
        let own = Process::of(Pid::this()).context("find this process in /proc")?;
        let mut places = Vec::new();
        for node in lab.nodes() {
            places.push(Facility {
                name: node.name().into(),
                netns: node.netns().name().into(),
                inode: node.netns().inode()?,
                address: Some(node.address().to_string()),
                run_dir: Some(node.run_dir()),
                state_dir: Some(node.state_dir()),
            });
        }
        let outside = (lab.underlay().outside_address().to_string(), &lab.underlay().outside);
        let pods = lab.pods();
        let pods = pods.iter().map(|pod| (pod.full_name(), pod.address().ok(), pod.netns()));
        let others = [
            ("outside".into(), Some(outside.0.parse()?), outside.1),
            ("underlay".into(), None, &lab.underlay().netns),
        ];
        for (name, address, netns) in pods.chain(others) {
            places.push(Facility {
                name,
                netns: netns.name().into(),
                inode: netns.inode()?,
                address: address.map(|it: std::net::IpAddr| it.to_string()),
                run_dir: None,
                state_dir: None,
            });
        }
        let binaries = if options.bare { None } else { Some(Binaries::get()?.directory().into()) };
        Ok(Self { keeper: own.to_string(), thread: lab.sandbox().keeper().as_raw(), binaries, places })
    }

    fn keeper(&self) -> Option<Process> {
        self.keeper.parse().ok()
    }
}

fn facts() -> anyhow::Result<Facts> {
    let text = fs::read(claim::base().join(NAME).join(FILE)).context(NONE_UP)?;
    serde_json::from_slice(&text).context("the lab's description can't be read")
}

fn claim_processes() -> Vec<Process> {
    let noted = fs::read_to_string(claim::base().join(NAME).join("processes")).unwrap_or_default();
    noted.lines().filter_map(|line| line.parse().ok()).collect()
}

/// So that `weft` is the one under test.
fn path(facts: &Facts) -> anyhow::Result<OsString> {
    let usual = tools::path_variable();
    let usual: Vec<_> = env::split_paths(&usual).collect();
    Ok(env::join_paths(facts.binaries.iter().cloned().chain(usual))?)
}

const NAME: &str = "up";
const FILE: &str = "lab.json";
const READY: &str = "ready";
const FAILED: &str = "failed: ";
const NONE_UP: &str = "no lab is up; `cargo lab up` starts one";
