//! A small Kubernetes API server: objects in memory, with the semantics that clients depend on.
//!
//! ```text
//!   GET    list (pages, field selectors), get, watch (chunked; bookmarks; 410 Gone; timeoutSeconds)
//!   POST   create: 409 AlreadyExists        PUT    replace: 409 Conflict on another resourceVersion
//!   PATCH  merge and strategic merge (conditions by type), of objects and of their status        DELETE
//! ```
//! Who comes with a service account's token may do what roles and bindings allow (`rbac.rs`), who comes without everything.
//! What goes wrong on the way to a server is the relay's business ([`crate::relay`]).
mod rbac;
mod store;

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::Response,
};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::background::Background;

use rbac::Wish;
use store::{Failure, Kind, Selector, Store};

/// Runs until it is dropped.
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    _background: Background,
}

struct Shared {
    store: Mutex<Store>,
    /// The version of the last change: wakes those who watch.
    version: watch::Sender<u64>,
    /// 410 Gone is the answer to a watch, not an event in it.
    is_blunt: AtomicBool,
}

type Parameters = HashMap<String, String>;

impl ApiServer {
    /// Listens on a free port of 127.0.0.1.
    pub fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            store: Mutex::default(),
            version: watch::Sender::new(0),
            is_blunt: AtomicBool::new(false),
        });
        let router = Router::new().fallback(serve).with_state(shared.clone());
        let serve = async move { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await };
        Ok(Self { address, shared, _background: Background::run(serve)? })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Forgets what has happened so far: who watches from before is told 410 Gone, by an event, as today's servers do, or
    /// `bluntly` by the answer's status.
    pub fn compact(&self, bluntly: bool) {
        self.shared.is_blunt.store(bluntly, Ordering::Relaxed);
        self.shared.store().compact();
    }

    /// How many requests of a method have come, watches not counted.
    pub fn requests(&self, method: &str) -> u64 {
        self.shared.store().requests.get(method).copied().unwrap_or_default()
    }
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(
        &self,
        method: &Method,
        target: &Target<'_>,
        body: &[u8],
        query: &Parameters,
        kind: &str,
    ) -> Result<Value, Failure> {
        let mut store = self.store();
        *store.requests.entry(method.to_string()).or_default() += 1;
        let answer = match (method.as_str(), target.name) {
            ("POST", Some(name)) if target.part == Some("token") => {
                let account = store.get(&target.kind, target.namespace, name)?;
                Ok(rbac::token(&account, parse(body)?))
            }
            (_, _) if target.part.is_some_and(|part| part != "status") => Err(missing(target.path)),
            ("GET", None) => store.list(&target.kind, &selector(target.namespace, query), query),
            ("GET", Some(name)) => store.get(&target.kind, target.namespace, name),
            ("POST", None) => store.create(&target.kind, target.namespace, parse(body)?),
            ("PUT", Some(name)) => store.replace(&target.kind, target.namespace, name, parse(body)?),
            ("PATCH", Some(name)) => {
                let strategic = match kind {
                    "application/strategic-merge-patch+json" => true,
                    "application/merge-patch+json" => false,
                    other => {
                        return Err(Failure::new(415, "UnsupportedMediaType", format!("a patch of {other}")));
                    }
                };
                let status = target.part.is_some();
                store.patch(&target.kind, target.namespace, name, &parse(body)?, strategic, status)
            }
            ("DELETE", Some(name)) => store.delete(&target.kind, target.namespace, name),
            _ => Err(Failure::new(405, "MethodNotAllowed", format!("{method} {:?}", target.path))),
        };
        self.version.send_replace(store.version());
        answer
    }
}

/// What a path is about.
struct Target<'a> {
    path: &'a [&'a str],
    kind: Kind,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
    /// What of it: `status`, `token`.
    part: Option<&'a str>,
}

impl<'a> Target<'a> {
    fn parse(path: &'a [&'a str]) -> Result<Self, Failure> {
        let (group, rest) = match path {
            ["api", "v1", rest @ ..] => ("", rest),
            ["apis", group, "v1" | "v1alpha2", rest @ ..] => (*group, rest),
            _ => return Err(missing(path)),
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (plural, name, part) = match rest {
            [plural] => (*plural, None, None),
            [plural, name] => (*plural, Some(*name), None),
            [plural, name, part] => (*plural, Some(*name), Some(*part)),
            _ => return Err(missing(path)),
        };
        Ok(Self { path, kind: Kind::of(group, plural).ok_or_else(|| missing(path))?, namespace, name, part })
    }
}

fn missing(path: &[&str]) -> Failure {
    Failure::new(404, "NotFound", format!("no such path: {path:?}"))
}

async fn serve(
    State(shared): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    Query(query): Query<Parameters>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let watches =
        method == Method::GET && query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let target = Target::parse(&path).and_then(|target| {
        let selector = selector(target.namespace, &query);
        let wish = Wish {
            verb: match (method.as_str(), target.name) {
                ("GET", None) if watches => "watch",
                ("GET", None) => "list",
                ("GET", Some(_)) => "get",
                ("POST", _) => "create",
                ("PUT", _) => "update",
                ("PATCH", _) => "patch",
                _ => "delete",
            },
            group: target.kind.group,
            resource: target
                .part
                .map_or(target.kind.plural.into(), |part| format!("{}/{part}", target.kind.plural)),
            namespace: target.namespace,
            name: target.name.or_else(|| selector.name()),
        };
        rbac::check(&shared.store(), text(header::AUTHORIZATION), &wish).map(|()| target)
    });
    let answer = match target {
        Ok(target) if watches => {
            return watching(shared, target.kind, selector(target.namespace, &query), &query);
        }
        Ok(target) => shared.answer(&method, &target, &body, &query, text(header::CONTENT_TYPE)),
        Err(failure) => Err(failure),
    };
    match answer {
        Ok(object) if method == Method::POST => reply(201, &object),
        Ok(object) => reply(200, &object),
        Err(failure) => reply(failure.code, &failure.status()),
    }
}

/// A line for each change since a version, for as long as the client wants.
fn watching(shared: Arc<Shared>, kind: Kind, selector: Selector, query: &Parameters) -> Response {
    let number = |key: &str| query.get(key).and_then(|text| text.parse::<u64>().ok());
    let until = Instant::now() + Duration::from_secs(number("timeoutSeconds").unwrap_or(300));
    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|wanted| wanted == "true");
    let seen = shared.version.subscribe();
    let from = number("resourceVersion").unwrap_or_else(|| shared.store().version());
    if shared.is_blunt.load(Ordering::Relaxed)
        && let Err(gone) = shared.store().since(&kind, &selector, from)
    {
        return reply(gone.code, &gone.status());
    }
    let state = (shared, seen, from, false);
    let lines = stream::unfold(state, move |(shared, mut seen, mut from, ended)| {
        let (kind, selector) = (kind.clone(), selector.clone());
        async move {
            if ended {
                return None;
            }
            loop {
                seen.mark_unchanged();
                let changes = shared.store().since(&kind, &selector, from);
                match changes {
                    Err(gone) => {
                        let line = line(&json!({"type": "ERROR", "object": gone.status()}));
                        return Some((line, (shared, seen, from, true)));
                    }
                    Ok(changes) if !changes.is_empty() => {
                        from = changes.last().map_or(from, |change| change.version);
                        let text: Vec<u8> = changes
                            .iter()
                            .flat_map(|change| line(&change.event).unwrap_or_default())
                            .collect();
                        return Some((Ok::<_, Infallible>(Bytes::from(text)), (shared, seen, from, false)));
                    }
                    Ok(_) => {}
                }
                let pause = (Instant::now() + BOOKMARK).min(until);
                if timeout_at(pause, seen.changed()).await.is_err() {
                    if Instant::now() >= until {
                        return None;
                    }
                    if bookmarks {
                        from = shared.store().version();
                        let line = line(&store::bookmark(&kind, from));
                        return Some((line, (shared, seen, from, false)));
                    }
                }
            }
        }
    });
    let body = Body::from_stream(lines);
    Response::builder().header(header::CONTENT_TYPE, JSON).body(body).expect("these headers are valid")
}

fn selector(namespace: Option<&str>, query: &Parameters) -> Selector {
    let fields = query.get("fieldSelector").map(String::as_str).unwrap_or_default();
    Selector::parse(namespace, fields)
}

fn parse(body: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure::new(400, "BadRequest", error.to_string()))
}

fn line(event: &Value) -> Result<Bytes, Infallible> {
    Ok(format!("{event}\n").into())
}

fn reply(code: u16, object: &Value) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let response = Response::builder().status(code).header(header::CONTENT_TYPE, JSON);
    response.body(Body::from(object.to_string())).expect("these headers are valid")
}

const JSON: &str = "application/json";
/// After so long without a change a watch is told how far it has come. The real one takes a minute.
const BOOKMARK: Duration = Duration::from_secs(1);
