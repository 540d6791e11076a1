//! `cargo lab policy-mistakes`: do the project's own tests notice plausible mistakes in the engine of network policies?
//!
//! ```text
//!   agent/src/{types,policy}, own cases ──copy──▶ a small package ──▶ its tests pass
//!                                                   └─ one mistake ──▶ they must not; the next one
//! ```
//! The copy is the pure part only, so that each mistake is seconds to compile. Nothing of the repository is changed.
use anyhow::{Context, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output},
    time::Instant,
};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// Only mistakes whose description contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Where the copy is made and compiled; kept, so that the next run is faster
    #[arg(long, value_name = "DIR", default_value = "/tmp/weft-policy-mistakes")]
    dir: PathBuf,
}

struct Mistake {
    what: &'static str,
    file: &'static str,
    /// Occurs once.
    right: &'static str,
    wrong: &'static str,
}

pub fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let wanted = |mistake: &&Mistake| options.only.as_ref().is_none_or(|text| mistake.what.contains(text));
    let mistakes: Vec<_> = MISTAKES.iter().filter(wanted).collect();
    let copy = Copy::make(&options.dir)?;
    // Before the long part: all must still be possible.
    let made = mistakes.iter().map(|it| copy.with(it)).collect::<Result<Vec<_>, _>>()?;
    copy.compile().context("the copy without mistakes")?;
    let failed = copy.failed_tests()?;
    ensure!(failed.is_empty(), "the copy without mistakes fails {}", failed.join(", "));
    let mut unnoticed = 0;
    for (mistake, text) in mistakes.iter().zip(made) {
        let (start, file) = (Instant::now(), copy.policy().join(mistake.file));
        let right = fs::read_to_string(&file)?;
        fs::write(&file, text)?;
        let failed = copy.compile().and_then(|()| copy.failed_tests());
        fs::write(&file, right)?;
        let failed = failed.with_context(|| format!("mistake `{}`", mistake.what))?;
        let seconds = start.elapsed().as_secs_f64();
        let by = if failed.is_empty() { "NOT NOTICED".into() } else { failed.join(", ") };
        println!("{}: {by} ({seconds:.0} s)", mistake.what);
        unnoticed += usize::from(failed.is_empty());
    }
    println!("{} mistakes, {unnoticed} not noticed", mistakes.len());
    Ok(if unnoticed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The pure part as a package of its own.
struct Copy(PathBuf);

impl Copy {
    fn make(dir: &Path) -> anyhow::Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the repository")?;
        let source = dir.join("src");
        if source.exists() {
            fs::remove_dir_all(&source).with_context(|| format!("remove {}", source.display()))?;
        }
        let copy = |from: &str, to: &str| -> anyhow::Result<()> {
            let (from, to) = (root.join(from), source.join(to));
            fs::create_dir_all(&to).with_context(|| format!("make {}", to.display()))?;
            for entry in fs::read_dir(&from).with_context(|| format!("read {}", from.display()))? {
                let path = entry?.path();
                if let Some(name) = path.file_name().filter(|name| *name != "task.rs") {
                    fs::copy(&path, to.join(name)).with_context(|| format!("copy {}", path.display()))?;
                }
            }
            Ok(())
        };
        copy("agent/src/types", "types")?;
        copy("agent/src/policy", "policy")?;
        let module = source.join("policy/mod.rs");
        let without_task = |line: &&str| !(line.starts_with("mod task") || line.starts_with("pub use task"));
        let text = fs::read_to_string(&module)?;
        fs::write(&module, text.lines().filter(without_task).collect::<Vec<_>>().join("\n"))?;
        for file in ["cases.rs", "pure.rs"] {
            fs::copy(root.join("tests/src/policy").join(file), source.join(file))?;
        }
        fs::copy(root.join("tests/policy/cases/cases.json"), source.join("cases.json"))?;
        fs::copy(root.join("Cargo.lock"), dir.join("Cargo.lock"))?;
        fs::write(dir.join("Cargo.toml"), MANIFEST)?;
        fs::write(source.join("lib.rs"), LIBRARY)?;
        Ok(Self(dir.to_path_buf()))
    }

    fn policy(&self) -> PathBuf {
        self.0.join("src/policy")
    }

    /// A file's text with a mistake in it.
    fn with(&self, mistake: &Mistake) -> anyhow::Result<String> {
        let Mistake { what, file, right, wrong } = mistake;
        let text = fs::read_to_string(self.policy().join(file))?;
        let count = text.matches(right).count();
        ensure!(count == 1, "mistake `{what}`: `{right}` occurs {count} times in {file}");
        Ok(text.replace(right, wrong))
    }

    fn compile(&self) -> anyhow::Result<()> {
        let output = self.cargo(&["test", "--offline", "--lib", "--no-run"])?;
        if !output.status.success() {
            bail!("does not compile: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Their names.
    fn failed_tests(&self) -> anyhow::Result<Vec<String>> {
        let output = self.cargo(&["test", "--offline", "--lib"])?;
        let text = String::from_utf8_lossy(&output.stdout);
        let failed = text.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"));
        let mut failed: Vec<String> = failed.map(String::from).collect();
        if !output.status.success() && failed.is_empty() {
            // It has run into a loop, or out of its stack.
            failed.push(format!("{}", output.status));
        }
        Ok(failed)
    }

    fn cargo(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new("cargo");
        command.args(arguments).current_dir(&self.0).env("CARGO_TARGET_DIR", self.0.join("target"));
        // What one mistake has shown is not to help with the next.
        command.env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1").env("PROPTEST_MAX_SHRINK_ITERS", "0");
        command.output().context("run cargo")
    }
}

/// Versions are those of the repository's lock file.
const MANIFEST: &str = r#"[package]
name = "weft"
version = "0.1.0"
edition = "2024"

[workspace]

[features]
agent = []

[dependencies]
anyhow = "*"
insta = "*"
ipnet = "*"
k8s-openapi = { version = "*", features = ["earliest"] }
prometheus-client = "*"
proptest = { version = "*", default-features = false, features = ["std"] }
serde = { version = "*", features = ["derive"] }
serde-saphyr = "*"
serde_json = "*"
siphasher = "*"
thiserror = "*"
tokio = { version = "*", features = ["sync"] }

[profile.dev]
debug = false
"#;

const LIBRARY: &str = r#"extern crate self as weft;
pub mod policy;
pub mod types;
#[cfg(test)]
mod cases;
#[cfg(test)]
mod pure;

#[derive(Default)]
pub struct Outcome {
    pub cases: usize,
    pub cells: usize,
    pub wrong: Vec<String>,
}

#[cfg(test)]
#[test]
fn own_cases() {
    let cases: Vec<cases::Case> = serde_json::from_str(include_str!("cases.json")).unwrap();
    let outcome = pure::run(&cases).unwrap();
    assert!(outcome.wrong.is_empty(), "{}", outcome.wrong.join("\n"));
}
"#;

const fn mistake(
    what: &'static str,
    file: &'static str,
    right: &'static str,
    wrong: &'static str,
) -> Mistake {
    Mistake { what, file, right, wrong }
}

const MISTAKES: &[Mistake] = &[
    mistake(
        "NotIn needs the key",
        "selector.rs",
        "Operator::NotIn(values) => value.is_none_or(",
        "Operator::NotIn(values) => value.is_some_and(",
    ),
    mistake(
        "an empty value is as good as no key",
        "selector.rs",
        "Operator::DoesNotExist => value.is_none(),",
        "Operator::DoesNotExist => value.is_none_or(|value| value.is_empty()),",
    ),
    mistake(
        "no key is as good as an empty value",
        "selector.rs",
        "Operator::In(values) => value.is_some_and(|value| values.contains(value)),",
        "Operator::In(values) => values.contains(value.map_or(\"\", |value| value.as_str())),",
    ),
    mistake(
        "one requirement of a selector is enough",
        "selector.rs",
        "self.0.iter().all(",
        "self.0.iter().any(",
    ),
    mistake(
        "policies without types isolate both directions",
        "convert.rs",
        "(names(\"Egress\") || types.is_empty() && !egress.is_empty())",
        "(names(\"Egress\") || types.is_empty())",
    ),
    mistake(
        "egress rules without types do not isolate egress",
        "convert.rs",
        "(names(\"Egress\") || types.is_empty() && !egress.is_empty())",
        "(names(\"Egress\"))",
    ),
    mistake(
        "egress rules without types leave ingress open",
        "convert.rs",
        "(types.is_empty() || names(\"Ingress\"))",
        "(types.is_empty() && egress.is_empty() || names(\"Ingress\"))",
    ),
    mistake(
        "an empty list of peers is nobody",
        "convert.rs",
        "let peers = peers.filter(|list| !list.is_empty()).map(",
        "let peers = peers.map(",
    ),
    mistake(
        "an empty list of ports is none",
        "convert.rs",
        "let ports = ports.filter(|list| !list.is_empty()).map(",
        "let ports = ports.map(",
    ),
    mistake(
        "a port without a protocol is UDP's",
        "convert.rs",
        "let protocol = object.protocol.as_deref().map_or(Ok(Protocol::Tcp), str::parse);",
        "let protocol = object.protocol.as_deref().map_or(Ok(Protocol::Udp), str::parse);",
    ),
    mistake(
        "completed pods count",
        "convert.rs",
        "matchable: !completed && !in_nodes_network,",
        "matchable: !in_nodes_network,",
    ),
    mistake(
        "pods in their node's network count",
        "convert.rs",
        "matchable: !completed && !in_nodes_network,",
        "matchable: !completed,",
    ),
    mistake(
        "endPort is passed over",
        "convert.rs",
        "Wanted::Range(number(*from)?, number(to)?),",
        "Wanted::Range(number(*from)?, number(to).and(number(*from))?),",
    ),
    mistake(
        "host bits of a CIDR count",
        "convert.rs",
        ".map(|prefix| prefix.trunc())",
        ".map(|prefix| prefix)",
    ),
    mistake(
        "a podSelector alone reaches all namespaces",
        "convert.rs",
        "None => Namespaces::Named(own.into()),",
        "None => Namespaces::Selected(Selector::from_iter(own.is_empty().then_some(Requirement { key: own.into(), operator: Operator::Exists }))),",
    ),
    mistake(
        "a range ends before its end",
        "model.rs",
        "(*from..=*to).contains(&number)",
        "(*from..*to).contains(&number)",
    ),
    mistake(
        "an exception larger than its block is passed over",
        "compile.rs",
        "except.contains(&block.cidr)",
        "*except == block.cidr",
    ),
    mistake(
        "an exception inside another ends it",
        "compile.rs",
        "        if last < from {\n            continue;\n        }\n",
        "",
    ),
    mistake(
        "named ports are looked up at the source",
        "render.rs",
        "\"{ip} daddr . {} dport @{} \"",
        "\"{ip} saddr . {} dport @{} \"",
    ),
    mistake(
        "a named port is one of any protocol",
        "compile.rs",
        "port.name == *name && port.protocol == *protocol",
        "port.name == *name && (port.protocol == *protocol || true)",
    ),
    mistake(
        "a range that begins inside another cuts it",
        "compile.rs",
        "last.1 = last.1.max(to),",
        "last.1 = to,",
    ),
    mistake(
        "named ports of pods elsewhere are not known",
        "compile.rs",
        "let local = direction == Direction::Ingress;",
        "let local = direction == Direction::Ingress || direction == Direction::Egress;",
    ),
    mistake(
        "the Baseline tier adds to a namespace's policies",
        "compile.rs",
        "if stages.is_empty() {\n        stages.extend(tier(Tier::Baseline)",
        "if !stages.is_empty() || stages.is_empty() {\n        stages.extend(tier(Tier::Baseline)",
    ),
    mistake(
        "the higher priority number is asked first",
        "index.rs",
        "(policy.tier, policy.priority, policy.name.clone())",
        "(policy.tier, 1000 - policy.priority, policy.name.clone())",
    ),
    mistake(
        "who passes is accepted, in the kernel",
        "render.rs",
        "Action::Pass => \"return\",",
        "Action::Pass => \"accept\",",
    ),
    mistake(
        "what is denied goes on to the next rule",
        "render.rs",
        "Action::Deny => \"drop\",",
        "Action::Deny => \"return\",",
    ),
    mistake(
        "who passes is accepted, in the rules",
        "rules.rs",
        "Some(Action::Pass) | None => {}",
        "Some(Action::Pass) => return true,\n                None => {}",
    ),
    mistake(
        "who passes is accepted, in what is explained",
        "explain.rs",
        "(rule.action != Action::Pass).then_some(ruled)",
        "Some(ruled)",
    ),
    mistake(
        "the delete of an old pod takes the address from the new one",
        "index.rs",
        "claims.iter().position(|claim| claim == uid)",
        "claims.iter().position(|_| !uid.0.is_empty())",
    ),
    mistake(
        "an address stays with its first pod",
        "index.rs",
        "and_then(|claims| claims.last())",
        "and_then(|claims| claims.first())",
    ),
    mistake(
        "a namespace that is not known is one without labels",
        "index.rs",
        "None => self.plain && selector.matches(",
        "None => selector.matches(",
    ),
    mistake(
        "new labels of a namespace are not looked at",
        "index.rs",
        "if known.map(|known| &known.labels) != Some(&namespace.labels) {",
        "if known.is_none() {",
    ),
    mistake(
        "the late delete of a policy removes its successor",
        "index.rs",
        "if self.policies.get(id).is_some_and(|known| known.uid == *uid) {",
        "if self.policies.get(id).is_some_and(|known| known.uid == *uid || known.id == *id) {",
    ),
    mistake(
        "a node's addresses are not its bridge's",
        "compile.rs",
        "index.nodes_in(block).filter(|node| !block.contains(*node))",
        "index.nodes_in(block).filter(|node| block.contains(*node))",
    ),
    mistake(
        "egress looks at who asks",
        "render.rs",
        "Direction::Egress => \"daddr\",",
        "Direction::Egress => \"saddr\",",
    ),
    mistake(
        "ingress is asked of the source",
        "render.rs",
        "ip daddr vmap @ingress4",
        "ip saddr vmap @ingress4",
    ),
    mistake(
        "a connection need not begin with a SYN",
        "render.rs",
        "tcp flags & (fin | syn | rst | ack) != syn counter name {LATE} drop",
        "tcp flags & (fin | syn | rst | ack) != syn counter name {LATE} return",
    ),
    mistake(
        "a pod can block itself",
        "rules.rs",
        "if own == other {",
        "if own == other && combination.is_empty() {",
    ),
    mistake(
        "what has no ports is on every port",
        "rules.rs",
        "(_, Service::Other) => false,",
        "(_, Service::Other) => true,",
    ),
    mistake(
        "who changes its labels stays in the sets",
        "compile.rs",
        ".filter(|element| standing.contains(element));",
        ".filter(|element| !standing.contains(element));",
    ),
    mistake(
        "a peer that is not known is nobody to deny",
        "cluster.rs",
        "(Some(_), Action::Deny | Action::Pass) => (Action::Deny, Rule { peers: None, ports: None }),",
        "(Some(_), Action::Deny | Action::Pass) => (Action::Deny, Rule { peers: Some(Vec::new()), ports: None }),",
    ),
    mistake(
        "a named port of the cluster's policies is TCP's",
        "cluster.rs",
        "return Ok(Some(PROTOCOLS.map(named).into()));",
        "return Ok(Some(vec![named(Protocol::Tcp)]));",
    ),
];
