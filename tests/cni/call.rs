//! One call of a plugin: environment and stdin in, exit code and JSON out.

use serde_json::Value;
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};
use weft::linux::netns::Netns;

/// What a runtime would send.
#[derive(Clone, Debug)]
pub struct Call {
    plugin: PathBuf,
    environment: Vec<(String, String)>,
    stdin: Stdin,
}

#[derive(Clone, Debug)]
enum Stdin {
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// What a plugin answered.
#[derive(Clone, Debug)]
pub struct Answer {
    pub code: Option<i32>,
    /// The one document on stdout, if there is any.
    pub json: Option<Value>,
    pub stderr: String,
    pub took: Duration,
}

impl Call {
    pub fn new(plugin: &Path, command: &str, conf: &Value) -> Self {
        Self {
            plugin: plugin.into(),
            environment: vec![
                ("CNI_COMMAND".into(), command.into()),
                ("CNI_PATH".into(), "/opt/cni/bin".into()),
            ],
            stdin: Stdin::Bytes(conf.to_string().into_bytes()),
        }
    }

    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.into(), value.into()));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self
    }

    pub fn stdin(self, bytes: impl Into<Vec<u8>>) -> Self {
        Self { stdin: Stdin::Bytes(bytes.into()), ..self }
    }

    pub fn stdin_file(self, path: &Path) -> Self {
        Self { stdin: Stdin::File(path.into()), ..self }
    }

    /// The command without its stdin.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.plugin);
        command.env_clear().envs(self.environment.iter().cloned());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it in the node's namespace. Stdout must hold one JSON document or nothing.
    pub fn run(&self, node: &Netns) -> Answer {
        let started = Instant::now();
        let output = node.enter(|| self.output()).expect("enter the node");
        Answer::new(output, started.elapsed())
    }

    fn output(&self) -> Output {
        let mut command = self.command();
        match &self.stdin {
            Stdin::File(path) => {
                command.stdin(File::open(path).unwrap());
                command.output().expect("run the plugin")
            }
            Stdin::Bytes(bytes) => {
                let mut child = command.stdin(Stdio::piped()).spawn().expect("run the plugin");
                // A plugin that refuses its environment does not read, and closes the pipe.
                let _ = child.stdin.take().expect("it is piped").write_all(bytes);
                child.wait_with_output().expect("wait for the plugin")
            }
        }
    }
}

impl Answer {
    pub fn new(output: Output, took: Duration) -> Self {
        let text = String::from_utf8(output.stdout).expect("stdout is UTF-8");
        let json = match text.trim() {
            "" => None,
            text => {
                Some(serde_json::from_str(text).unwrap_or_else(|e| panic!("one JSON document: {e}: {text}")))
            }
        };
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Self { code: output.status.code(), json, stderr, took }
    }

    /// The result of a call that worked.
    #[track_caller]
    pub fn result(&self) -> &Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.json.as_ref().unwrap_or_else(|| panic!("a result: {self:?}"))
    }

    /// A call that worked and printed nothing.
    #[track_caller]
    pub fn silence(&self) {
        assert_eq!((self.code, &self.json), (Some(0), &None), "{self:?}");
    }

    /// The code of a call that failed, with all that an error carries.
    #[track_caller]
    pub fn failure(&self) -> (u64, String) {
        assert_eq!(self.code, Some(1), "{self:?}");
        let error = self.json.as_ref().unwrap_or_else(|| panic!("an error: {self:?}"));
        assert!(error["cniVersion"].is_string() && error["details"].is_string(), "{error}");
        (error["code"].as_u64().expect("a code"), error["msg"].as_str().expect("a message").into())
    }

    #[track_caller]
    pub fn details(&self) -> String {
        self.failure();
        self.json
            .as_ref()
            .map(|error| error["details"].as_str().unwrap_or_default().to_string())
            .unwrap_or_default()
    }

    /// Asserts the code and returns the message.
    #[track_caller]
    pub fn fails_with(&self, code: u64) -> String {
        let (given, message) = self.failure();
        assert_eq!(given, code, "{message}");
        message
    }
}
