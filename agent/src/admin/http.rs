//! The HTTP pages on `--metrics-addr`: `/livez`, `/readyz`, `/metrics`, and `/` that lists them.

use super::{Heartbeats, Metrics, Observer, Readiness};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{Html, IntoResponse},
    routing::get,
};
use futures_util::FutureExt;
use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::net::TcpListener;

/// Bound, not yet serving: so that a port in use is known before anything is touched.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
}

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    pub readiness: Readiness,
    pub heartbeats: Heartbeats,
    pub metrics: Arc<Metrics>,
    pub observer: Observer,
}

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("--metrics-addr {address}: cannot listen: {source}{}", hint(.source))]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error("serve health and metrics: {0}")]
    Serve(std::io::Error),
}

impl HttpServer {
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| HttpError::Bind { address, source })?;
        Ok(Self { listener })
    }

    /// Where it listens: the port that the kernel chose, if it was asked for 0.
    pub fn local_addr(&self) -> Result<SocketAddr, HttpError> {
        self.listener.local_addr().map_err(HttpError::Serve)
    }

    /// Serves until `shutdown` resolves and the requests under way are answered, or `GRACE` later at the latest.
    pub async fn serve(
        self,
        pages: Pages,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), HttpError> {
        let router = Router::new()
            .route("/", get(index))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(pages);
        let shutdown = shutdown.shared();
        let server = axum::serve(self.listener, router).with_graceful_shutdown(shutdown.clone());
        tokio::select! {
            served = server => served.map_err(HttpError::Serve),
            () = shutdown.then(|()| tokio::time::sleep(GRACE)) => Ok(()),
        }
    }
}

async fn index(State(pages): State<Pages>) -> Html<String> {
    let now = pages.observer.snapshot();
    let ready = if now.is_ready() { "ready" } else { "not ready" };
    // Names are letters, digits, `-`, `.` and `_`: nothing to escape.
    Html(format!(
        "<!doctype html><title>Weft on {name}</title><h1>Weft on {name}</h1><p>{ready}\
         <ul><li><a href=/livez>/livez</a><li><a href=/readyz>/readyz</a><li><a href=/metrics>/metrics</a></ul>\n",
        name = now.name
    ))
}

async fn livez(State(pages): State<Pages>) -> (StatusCode, String) {
    let stalls = pages.heartbeats.stalled(Instant::now());
    answer(stalls.iter().map(ToString::to_string), StatusCode::INTERNAL_SERVER_ERROR)
}

async fn readyz(State(pages): State<Pages>) -> (StatusCode, String) {
    answer(pages.readiness.reasons().into_iter(), StatusCode::SERVICE_UNAVAILABLE)
}

async fn metrics(State(pages): State<Pages>) -> impl IntoResponse {
    ([(CONTENT_TYPE, Metrics::CONTENT_TYPE)], pages.metrics.render())
}

/// `ok`, or one complaint a line.
fn answer(complaints: impl Iterator<Item = String>, otherwise: StatusCode) -> (StatusCode, String) {
    let text = complaints.fold(String::new(), |mut text, complaint| {
        writeln!(text, "{complaint}").expect("writing to a string does not fail");
        text
    });
    if text.is_empty() { (StatusCode::OK, "ok\n".into()) } else { (otherwise, text) }
}

fn hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => "; another program has that port, or another agent runs",
        std::io::ErrorKind::AddrNotAvailable => "; this host does not have that address",
        _ => "",
    }
}

/// For answers to slow readers at the end.
const GRACE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Pending, snapshot::example};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A server on a port of the kernel's choice, and the guard that keeps it from being ready.
    async fn serve() -> (SocketAddr, Pages, Pending) {
        let (readiness, starting) = Readiness::new();
        let observer: Observer = Arc::new(example::snapshot);
        let pages = Pages {
            readiness,
            heartbeats: Heartbeats::new(Instant::now() - Duration::from_secs(60)),
            metrics: Arc::new(Metrics::new(observer.clone())),
            observer,
        };
        let server = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.local_addr().unwrap();
        tokio::spawn(server.serve(pages.clone(), std::future::pending()));
        (address, pages, starting)
    }

    async fn fetch(address: SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        answer
    }

    #[tokio::test]
    async fn readyz_says_what_is_missing() {
        let (address, pages, starting) = serve().await;
        let down = pages.readiness.pending("bridge weft is down");
        drop(starting);
        let answer = fetch(address, "/readyz").await;
        assert!(
            answer.starts_with("HTTP/1.1 503") && answer.ends_with("\r\nbridge weft is down\n"),
            "{answer}"
        );
        drop(down);
        let answer = fetch(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\nok\n"), "{answer}");
    }

    #[tokio::test]
    async fn livez_names_the_loop_that_is_stuck() {
        let (address, pages, _starting) = serve().await;
        let alive = pages.heartbeats.register("mesh", Instant::now());
        assert!(fetch(address, "/livez").await.starts_with("HTTP/1.1 200"));
        let _stuck = pages.heartbeats.register("links", Instant::now() - Duration::from_secs(11));
        let answer = fetch(address, "/livez").await;
        let body = "\r\nlinks has not ticked for 11 s\n";
        assert!(answer.starts_with("HTTP/1.1 500") && answer.ends_with(body), "{answer}");
        alive.finish();
    }

    #[tokio::test]
    async fn metrics_are_openmetrics_and_the_index_leads_there() {
        let (address, ..) = serve().await;
        let answer = fetch(address, "/metrics").await;
        assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        assert!(fetch(address, "/").await.contains("href=/metrics"));
        assert!(fetch(address, "/x").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn a_port_in_use_is_reported_with_the_flag() {
        let (address, ..) = serve().await;
        let error = HttpServer::bind(address).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("--metrics-addr {address}: cannot listen: ")), "{error}");
        assert!(error.ends_with("another program has that port, or another agent runs"), "{error}");
    }

    #[tokio::test]
    async fn a_request_that_never_ends_does_not_hold_up_the_shutdown() {
        let (_, pages, _starting) = serve().await;
        let server = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let served = tokio::spawn(server.serve(pages, stopped.map(drop)));
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HT").await.unwrap();
        // Connections are accepted in their order: when this one is answered, the other one is under way.
        assert!(fetch(address, "/livez").await.starts_with("HTTP/1.1 200"));
        stop.send(()).unwrap();
        tokio::time::timeout(GRACE * 5, served).await.unwrap().unwrap().unwrap();
    }
}
