//! `weft policy`: network policies of this node; and `weft pods label`.

use super::{
    CliError, How,
    client::Client,
    print, tables,
    view::{Explanation, Policies},
};
use crate::config::socket_in;
use clap::Subcommand;
use serde_json::json;
use std::{fs, io, io::Read, path::PathBuf};
use weft_proto::local;

#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Take in NetworkPolicy, Namespace and Pod objects, and return once they are in force on this node
    ///
    /// For hosts without Kubernetes. Each node has its own: apply the same file on all of them. A Namespace says its labels, a
    /// Pod its labels, named ports, and in status.podIPs its addresses, which a pod of this node has anyway.
    Apply {
        /// YAML or JSON, several documents and lists too; - is standard input
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
        /// Delete what was applied before and is not in the file
        #[arg(long)]
        only: bool,
        #[command(flatten)]
        how: How,
    },
    /// Delete an object that was applied
    Delete {
        /// NAMESPACE/NAME
        name: String,
        #[arg(long, default_value = "NetworkPolicy")]
        kind: String,
        #[command(flatten)]
        how: How,
    },
    /// Show all policies, whom they isolate here, and what they have let pass
    List(How),
    /// Say which policy decides whether a connection may begin, at both ends
    Explain {
        /// Who begins: an address, or NAMESPACE/POD
        source: String,
        /// To whom: ADDRESS or NAMESPACE/POD, then :PORT/PROTOCOL; an IPv6 address in brackets
        destination: String,
        #[command(flatten)]
        how: How,
    },
}

#[derive(Debug, clap::Args)]
pub struct Label {
    /// NAMESPACE/POD
    pod: String,
    /// KEY=VALUE: all labels that it shall have
    labels: Vec<String>,
    #[command(flatten)]
    how: How,
}

impl Label {
    pub async fn run(self) -> Result<(), CliError> {
        let Self { pod, labels, how } = self;
        let (namespace, name) = pod
            .split_once('/')
            .ok_or_else(|| CliError::Meant(format!("`{pod}` is not NAMESPACE/POD, such as default/web")))?;
        let pair = |text: &String| match text.split_once('=') {
            Some((key, value)) => Ok((key.to_string(), json!(value))),
            None => Err(CliError::Meant(format!("`{text}` is not KEY=VALUE"))),
        };
        let labels: serde_json::Map<_, _> = labels.iter().map(pair).collect::<Result<_, _>>()?;
        let metadata = json!({"namespace": namespace, "name": name, "labels": labels});
        let text = json!({"kind": "Pod", "metadata": metadata}).to_string();
        let mut client = Client::connect(&socket_in(&how.run_dir)).await?;
        let reply = client.policy_apply(local::PolicyApplyRequest { text, only: false }).await?;
        print(&applied(&reply, &how)?)
    }
}

impl PolicyCommand {
    /// Asks the agent, and writes its answer to standard output.
    pub async fn run(self) -> Result<(), CliError> {
        let how = match &self {
            Self::Apply { how, .. }
            | Self::Delete { how, .. }
            | Self::Explain { how, .. }
            | Self::List(how) => how.clone(),
        };
        // Before anything of the agent's is asked: what was meant may be wrong.
        let request = self.request()?;
        let mut client = Client::connect(&socket_in(&how.run_dir)).await?;
        let text = match request {
            Request::Apply(request) => applied(&client.policy_apply(request).await?, &how)?,
            Request::Delete(request) => {
                let gone = format!("deleted {} {}\n", request.kind, request.name);
                client.policy_delete(request).await?;
                gone
            }
            Request::List => how.show(&Policies::from(client.policy_list().await?), tables::policies)?,
            Request::Explain(request) => {
                how.show(&Explanation::from(client.policy_explain(request).await?), tables::explanation)?
            }
        };
        print(&text)
    }

    fn request(self) -> Result<Request, CliError> {
        Ok(match self {
            Self::Apply { file, only, .. } => {
                let text = match file.to_str() {
                    Some("-") => {
                        let mut text = String::new();
                        io::stdin().read_to_string(&mut text).map(|_| text)
                    }
                    _ => fs::read_to_string(&file),
                };
                let text =
                    text.map_err(|error| CliError::Input { file: file.display().to_string(), error })?;
                Request::Apply(local::PolicyApplyRequest { text, only })
            }
            Self::Delete { name, kind, .. } => Request::Delete(local::PolicyDeleteRequest { kind, name }),
            Self::List(_) => Request::List,
            Self::Explain { source, destination, .. } => {
                Request::Explain(explain(source, &destination).ok_or_else(|| {
                    let example = "10.32.0.5:80/TCP or shop/web:http/TCP";
                    CliError::Meant(format!(
                        "`{destination}` is not DESTINATION:PORT/PROTOCOL, such as {example}"
                    ))
                })?)
            }
        })
    }
}

enum Request {
    Apply(local::PolicyApplyRequest),
    Delete(local::PolicyDeleteRequest),
    List,
    Explain(local::PolicyExplainRequest),
}

fn explain(source: String, destination: &str) -> Option<local::PolicyExplainRequest> {
    let (destination, service) = destination.rsplit_once(':')?;
    let (port, protocol) = service.split_once('/').unwrap_or((service, "TCP"));
    let destination = destination.trim_matches(['[', ']']).to_string();
    let complete = !destination.is_empty() && !port.is_empty();
    let (port, protocol) = (port.into(), protocol.into());
    complete.then_some(local::PolicyExplainRequest { source, destination, port, protocol })
}

fn applied(reply: &local::PolicyApplyReply, how: &How) -> Result<String, CliError> {
    let as_json = json!({"applied": reply.applied, "deleted": reply.deleted});
    how.show(&as_json, |_| {
        let applied = reply.applied.iter().map(|name| format!("applied {name}\n"));
        let text: String =
            applied.chain(reply.deleted.iter().map(|name| format!("deleted {name}\n"))).collect();
        if text.is_empty() { "nothing changed\n".into() } else { text }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_has_a_port_and_perhaps_a_protocol() {
        let parts = |text| {
            let it = explain("a/b".into(), text)?;
            Some([it.destination, it.port, it.protocol])
        };
        assert_eq!(parts("x/web:http/UDP"), Some(["x/web", "http", "UDP"].map(String::from)));
        assert_eq!(parts("10.32.0.5:80"), Some(["10.32.0.5", "80", "TCP"].map(String::from)));
        assert_eq!(parts("[fd00::1]:80/TCP"), Some(["fd00::1", "80", "TCP"].map(String::from)));
        assert_eq!(parts("x/web"), None);
        assert_eq!(parts("x/web:"), None);
    }
}
