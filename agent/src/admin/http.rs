//! The HTTP pages on `--metrics-addr`: `/livez`, `/readyz`, `/metrics`, and `/` that lists them.
//!
//! Whoever reaches the port can connect as often as he likes: a connection carries one request and has to be quick about
//! it, and where there are too many the oldest gives way, so that a probe is always answered.

use super::{Heartbeats, Metrics, Observer, Readiness, STARTING};
use axum::{
    Router,
    extract::{Request, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{Html, IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use hyper::server::conn::http1;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use std::{
    collections::VecDeque,
    fmt::Write as _,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

/// Bound, not yet serving: so that a port in use is known before anything is touched.
#[derive(Debug)]
pub struct HttpServer<L = TcpListener> {
    listener: L,
}

impl AsFd for HttpServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
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
    #[error("--probe-socket {}: cannot listen: {source}", path.display())]
    BindProbes { path: PathBuf, source: std::io::Error },
}

impl HttpServer {
    pub async fn bind(address: SocketAddr) -> Result<Self, HttpError> {
        let listener =
            TcpListener::bind(address).await.map_err(|source| HttpError::Bind { address, source })?;
        Ok(Self { listener })
    }

    /// A listener of another agent's.
    pub fn adopt(listener: std::net::TcpListener) -> std::io::Result<Self> {
        Ok(Self { listener: TcpListener::from_std(listener)? })
    }
}

impl HttpServer<UnixListener> {
    /// In the place of a socket that is there: that was of a process before.
    pub fn bind_probes(path: &Path) -> Result<Self, HttpError> {
        let bind = || {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            UnixListener::bind(path)
        };
        let listener = bind().map_err(|source| HttpError::BindProbes { path: path.into(), source })?;
        Ok(Self { listener })
    }
}

impl<L: Listener> HttpServer<L> {
    /// Serves until `shutdown` resolves and the requests under way are answered, or `GRACE` later at the latest.
    pub async fn serve(mut self, router: Router, shutdown: impl Future<Output = ()> + Send) {
        let (mut shutdown, mut tasks) = (pin!(shutdown), JoinSet::new());
        let mut open: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let (stream, _) = tokio::select! {
                accepted = self.listener.accept() => accepted,
                () = &mut shutdown => break,
            };
            while tasks.try_join_next().is_some() {}
            open.retain(|connection| !connection.is_finished());
            if open.len() == CONNECTIONS
                && let Some(oldest) = open.pop_front()
            {
                oldest.abort();
            }
            open.push_back(tasks.spawn(answer_one(stream, router.clone())));
        }
        drop(self.listener);
        let _ = timeout(GRACE, async { while tasks.join_next().await.is_some() {} }).await;
    }
}

/// One request, from the connection to its end. What goes wrong is the caller's business.
async fn answer_one(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
    let _ = timeout(PATIENCE, connection).await;
}

impl Pages {
    pub fn router(self) -> Router {
        Router::new()
            .route("/", get(index))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self)
    }

    /// What is answered before there are pages: alive, and nothing else yet.
    pub fn starting(request: &Request) -> Response {
        match request.uri().path() {
            "/livez" => "ok\n".into_response(),
            _ => (StatusCode::SERVICE_UNAVAILABLE, format!("{STARTING}\n")).into_response(),
        }
    }

    /// What is answered once the next agent does the work: alive, and no use.
    pub fn over(request: &Request) -> Response {
        match request.uri().path() {
            "/livez" => "ok\n".into_response(),
            _ => (StatusCode::SERVICE_UNAVAILABLE, "the next agent has taken over\n").into_response(),
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

/// Connections at a time: some times those of kubelet, Prometheus and people.
const CONNECTIONS: usize = 64;
/// From the connection to the answer's last byte.
const PATIENCE: Duration = Duration::from_secs(5);
/// For answers to slow readers at the end.
const GRACE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Pending, snapshot::example};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        sync::oneshot,
        task::JoinHandle,
    };

    /// A server on a port of the kernel's choice.
    async fn listen(router: Router) -> (SocketAddr, oneshot::Sender<()>, JoinHandle<()>) {
        let server = HttpServer::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let (address, (stop, stopped)) = (server.listener.local_addr().unwrap(), oneshot::channel());
        let served = tokio::spawn(async move { server.serve(router, async { drop(stopped.await) }).await });
        (address, stop, served)
    }

    /// A server of pages, and the guard that keeps it from being ready.
    async fn serve() -> (SocketAddr, Pages, Pending, oneshot::Sender<()>) {
        let (readiness, starting) = Readiness::new();
        let observer: Observer = Arc::new(example::snapshot);
        let pages = Pages {
            readiness,
            heartbeats: Heartbeats::new(Instant::now() - Duration::from_secs(60)),
            metrics: Arc::new(Metrics::new(observer.clone())),
            observer,
        };
        let (address, stop, _) = listen(pages.clone().router()).await;
        (address, pages, starting, stop)
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
        let (address, pages, starting, _stop) = serve().await;
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
        let (address, pages, _starting, _stop) = serve().await;
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
        let (address, _pages, _starting, _stop) = serve().await;
        let answer = fetch(address, "/metrics").await;
        assert!(answer.contains("content-type: application/openmetrics-text"), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        assert!(fetch(address, "/").await.contains("href=/metrics"));
        assert!(fetch(address, "/x").await.starts_with("HTTP/1.1 404"));
    }

    #[tokio::test]
    async fn a_port_in_use_is_reported_with_the_flag() {
        let (address, _pages, _starting, _stop) = serve().await;
        let error = HttpServer::bind(address).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("--metrics-addr {address}: cannot listen: ")), "{error}");
        assert!(error.ends_with("another program has that port, or another agent runs"), "{error}");
    }

    #[tokio::test]
    async fn a_request_that_never_ends_does_not_hold_up_the_shutdown() {
        let (address, stop, served) = listen(Router::new()).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HT").await.unwrap();
        // Connections are accepted in their order: when this one is answered, the other one is under way.
        assert!(fetch(address, "/").await.starts_with("HTTP/1.1 404"));
        stop.send(()).unwrap();
        timeout(GRACE * 3, served).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_is_silent_gives_way_to_others_and_is_not_waited_for_long() {
        let (address, _stop, _) = listen(Router::new()).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS + 2 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        assert!(fetch(address, "/").await.starts_with("HTTP/1.1 404"));
        let mut end = async |which: usize, within| timeout(within, silent[which].read_u8()).await;
        assert!(end(0, GRACE).await.unwrap().is_err(), "the oldest has given way");
        assert!(end(CONNECTIONS, GRACE).await.is_err(), "the others have not");
        assert!(end(CONNECTIONS, PATIENCE).await.unwrap().is_err(), "but in time");
    }

    #[tokio::test]
    async fn an_agent_that_is_starting_says_so() {
        let (address, _stop, _) = listen(super::super::Front::default().router(Pages::starting)).await;
        assert!(fetch(address, "/livez").await.starts_with("HTTP/1.1 200"));
        for page in ["/readyz", "/metrics", "/"] {
            let answer = fetch(address, page).await;
            assert!(
                answer.starts_with("HTTP/1.1 503") && answer.contains("the agent is starting"),
                "{answer}"
            );
        }
    }
}
