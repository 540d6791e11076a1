//! The agent of this node, over its unix socket.

use crate::failure::{Failure, code};
use hyper_util::rt::TokioIo;
use prost::Message;
use std::{future::Future, io, net::IpAddr, path::Path, str::FromStr, time::Duration};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout_at},
};
use tonic::{
    Code, Request, Response, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};
use tower::service_fn;
use weft::types::{AttachmentKey, Mac, Prefix};
use weft_proto::local::{self, cni_client::CniClient};

/// A connection, good until its deadline.
pub struct Agent {
    client: CniClient<Channel>,
    deadline: Instant,
}

/// What a pod's side is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Each address with the bridge's address of its family, IPv4 before IPv6.
    pub addresses: Vec<(Prefix, IpAddr)>,
    pub mac: Mac,
    pub mtu: u32,
    pub host_interface: String,
    pub host_mac: Mac,
    pub host_alias: String,
    pub bridge: String,
    pub bridge_mac: Mac,
}

impl Agent {
    /// # Errors
    /// Code 100, saying what to do.
    pub async fn connect(socket: &Path, within: Duration) -> Result<Self, Failure> {
        let deadline = Instant::now() + within;
        let unreachable = |why: String| {
            let msg = format!(
                "the Weft agent does not answer at {}: {why}; is it running on this node?",
                socket.display()
            );
            Failure::new(code::AGENT_UNREACHABLE, msg)
        };
        let stream = timeout_at(deadline, UnixStream::connect(socket))
            .await
            .map_err(|_| unreachable("timed out".into()))?
            .map_err(|error| unreachable(error.to_string()))?;
        // Handed over once: a second connection would be to another agent.
        let mut stream = Some(TokioIo::new(stream));
        let connector = service_fn(move |_| {
            let stream = stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionReset));
            async move { stream }
        });
        // The authority is never looked up.
        let endpoint = Endpoint::from_static("http://weft");
        let channel = timeout_at(deadline, endpoint.connect_with_connector(connector))
            .await
            .map_err(|_| unreachable("timed out".into()))?
            .map_err(|error| unreachable(error.to_string()))?;
        Ok(Self { client: CniClient::new(channel), deadline })
    }

    /// # Errors
    /// What the agent says.
    pub async fn reserve(&mut self, request: local::ReserveRequest) -> Result<Reservation, Failure> {
        let call = self.client.reserve(traced(request));
        Reservation::parse(answer(self.deadline, call).await?)
    }

    pub async fn activate(&mut self, key: &AttachmentKey) -> Result<(), Failure> {
        let request = local::ActivateRequest { attachment: Some(attachment(key)) };
        answer(self.deadline, self.client.activate(traced(request))).await.map(|_| ())
    }

    pub async fn release(&mut self, key: &AttachmentKey) -> Result<(), Failure> {
        let request = local::ReleaseRequest { attachment: Some(attachment(key)) };
        answer(self.deadline, self.client.release(traced(request))).await.map(|_| ())
    }

    /// The attachment as it was reserved.
    pub async fn check(&mut self, key: &AttachmentKey, addresses: &[Prefix]) -> Result<Reservation, Failure> {
        let addresses = addresses.iter().map(|address| address.addr().to_string()).collect();
        let request = local::CheckRequest { attachment: Some(attachment(key)), addresses };
        let reply = answer(self.deadline, self.client.check(traced(request))).await?;
        Reservation::parse(reply.reservation.unwrap_or_default())
    }

    pub async fn gc(&mut self, valid: Vec<(String, String)>) -> Result<(), Failure> {
        let attachment = |(container_id, ifname)| local::Attachment { container_id, ifname };
        let request = local::GcRequest { valid: valid.into_iter().map(attachment).collect() };
        answer(self.deadline, self.client.gc(traced(request))).await.map(|_| ())
    }

    pub async fn ready(&mut self) -> Result<(), Failure> {
        answer(self.deadline, self.client.ready(traced(local::ReadyRequest {}))).await.map(|_| ())
    }
}

impl Reservation {
    fn parse(given: local::Reservation) -> Result<Self, Failure> {
        let addresses: Vec<Prefix> = all(&given.addresses)?;
        let gateways: Vec<IpAddr> = all(&given.gateways)?;
        let fits = |(address, gateway): (&Prefix, &IpAddr)| address.addr().is_ipv4() == gateway.is_ipv4();
        if addresses.is_empty()
            || addresses.len() != gateways.len()
            || !addresses.iter().zip(&gateways).all(fits)
        {
            return Err(nonsense(format!("addresses {addresses:?} with gateways {gateways:?}")));
        }
        Ok(Self {
            addresses: addresses.into_iter().zip(gateways).collect(),
            mac: one(&given.mac)?,
            mtu: given.mtu,
            host_interface: given.host_interface,
            host_mac: one(&given.host_mac)?,
            host_alias: given.host_alias,
            bridge: given.bridge,
            bridge_mac: one(&given.bridge_mac)?,
        })
    }
}

pub fn attachment(key: &AttachmentKey) -> local::Attachment {
    local::Attachment { container_id: key.container_id().into(), ifname: key.ifname().into() }
}

/// The runtime's trace goes on in the agent.
fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    for (variable, key) in
        [("TRACEPARENT", "traceparent"), ("TRACESTATE", "tracestate"), ("BAGGAGE", "baggage")]
    {
        let value = std::env::var(variable).ok().and_then(|text| AsciiMetadataValue::try_from(text).ok());
        if let Some(value) = value {
            request.metadata_mut().insert(key, value);
        }
    }
    request
}

async fn answer<T>(
    deadline: Instant,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match timeout_at(deadline, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failure(&status)),
        Err(_) => Err(Failure::new(code::AGENT_UNREACHABLE, "the Weft agent did not answer in time")),
    }
}

fn failure(status: &Status) -> Failure {
    match local::Failure::decode(status.details()) {
        Ok(local::Failure { code, msg, details }) if code != 0 => Failure { code, msg, details },
        _ => {
            let why = match status.code() {
                Code::Unimplemented => "it is of another version: upgrade weft and weft-cni together",
                _ => status.message(),
            };
            Failure::new(code::AGENT_UNREACHABLE, format!("the Weft agent broke off: {why}"))
        }
    }
}

fn all<T: FromStr>(texts: &[String]) -> Result<Vec<T>, Failure> {
    texts.iter().map(|text| one(text)).collect()
}

fn one<T: FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| nonsense(format!("`{text}`")))
}

fn nonsense(what: String) -> Failure {
    let msg = format!("the Weft agent answered with {what}: upgrade weft and weft-cni together");
    Failure::new(code::INTERNAL, msg)
}
