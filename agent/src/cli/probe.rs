//! `weft probe`: what Kubernetes asks its container, and no other agent's.

use anyhow::{Context, bail};
use axum::body::{Body, to_bytes};
use clap::{Args, ValueEnum};
use hyper::{Request, client::conn::http1::handshake, header::HOST};
use hyper_util::rt::TokioIo;
use std::{path::PathBuf, time::Duration};
use tokio::{net::UnixStream, time::timeout};

#[derive(Debug, Args)]
pub struct ProbeArgs {
    what: What,
    /// Socket that the agent was given with its --probe-socket
    #[arg(long, env = "WEFT_PROBE_SOCKET", hide_env_values = true, value_name = "PATH")]
    probe_socket: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Whether its loops turn
    Live,
    /// Whether a pod would get its network
    Ready,
}

impl ProbeArgs {
    /// # Errors
    /// The agent does not answer, or says no.
    pub async fn run(&self) -> anyhow::Result<()> {
        let answer = timeout(PATIENCE, self.ask()).await;
        answer
            .context("no answer in time")
            .and_then(|answer| answer)
            .with_context(|| format!("ask the agent on {}", self.probe_socket.display()))
    }

    async fn ask(&self) -> anyhow::Result<()> {
        let stream = UnixStream::connect(&self.probe_socket).await?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        let path = match self.what {
            What::Live => "/livez",
            What::Ready => "/readyz",
        };
        let request = Request::get(path).header(HOST, "agent").body(Body::empty())?;
        let ask = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            anyhow::Ok((status, to_bytes(Body::new(response.into_body()), ANSWER).await?))
        };
        let (asked, _) = tokio::join!(ask, connection);
        let (status, text) = asked?;
        if !status.is_success() {
            bail!("{}", String::from_utf8_lossy(&text).trim_end());
        }
        Ok(())
    }
}

/// Below the time that Kubernetes gives a probe.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Bytes of an answer.
const ANSWER: usize = 1 << 16;
