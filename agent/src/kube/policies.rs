//! Watches what network policies are made of: policies, namespaces, and all the cluster's pods.
//!
//! Where the server does not know ClusterNetworkPolicy objects at all there are none of them.

use super::{
    client::{WATCH, is_missing},
    task::Handle,
    watches::{Patience, is_expired},
};
use crate::policy::cluster::ClusterNetworkPolicy;
use futures_util::{Stream, StreamExt, stream::select_all};
use k8s_openapi::api::{
    core::v1::{Namespace, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use std::{fmt::Debug, future::ready, pin::Pin};
use tokio::{sync::mpsc, time::sleep};
use tracing::{debug, warn};

/// What the server has said of one kind.
#[derive(Debug)]
pub enum News<K> {
    /// All there are.
    All(Vec<K>),
    Applied(K),
    Gone(K),
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "each is taken at once and none is kept")]
pub enum Heard {
    Policy(News<NetworkPolicy>),
    ClusterPolicy(News<ClusterNetworkPolicy>),
    Namespace(News<Namespace>),
    Pod(News<Pod>),
}

/// Tells until nobody listens, of policies for the cluster where asked to. A full channel makes the watch wait.
pub async fn hear(handle: Handle, cluster_policies: bool, tell: mpsc::Sender<Heard>) {
    let (mut clients, mut patience) = (handle.clients(), Patience::default());
    loop {
        let client = clients.borrow_and_update().watches.clone();
        let mut heard = select_all([
            watched(Api::all(client.clone()), Heard::Policy),
            watched(Api::all(client.clone()), Heard::Namespace),
            watched(Api::all(client.clone()), Heard::Pod),
        ]);
        if cluster_policies {
            heard.push(watched(Api::all(client), Heard::ClusterPolicy));
        }
        loop {
            tokio::select! {
                Some(heard) = heard.next() => match heard {
                    Some(heard) => if tell.send(heard).await.is_err() {
                        return;
                    },
                    None => {
                        tokio::select! {
                            () = sleep(patience.next().expect("there is always a pause")) => {}
                            () = tell.closed() => return,
                        }
                        break;
                    }
                },
                changed = clients.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return,
                },
                () = tell.closed() => return,
            }
        }
        debug!("network policies are watched anew");
    }
}

/// None: it has to be begun anew.
fn watched<K>(api: Api<K>, heard: fn(News<K>) -> Heard) -> Pin<Box<dyn Stream<Item = Option<Heard>> + Send>>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + Debug + Send + 'static,
{
    let config = watcher::Config::default().timeout(WATCH.as_secs() as u32);
    let events = watcher(api, config).backoff(Patience::default());
    let (mut listed, mut unknown) = (Vec::new(), false);
    let news = events.filter_map(move |event| {
        let news = match event {
            Ok(Event::Init) => {
                listed.clear();
                None
            }
            Ok(Event::InitApply(object)) => {
                listed.push(object);
                None
            }
            Ok(Event::InitDone) => Some(News::All(std::mem::take(&mut listed))),
            Ok(Event::Apply(object)) => Some(News::Applied(object)),
            Ok(Event::Delete(object)) => Some(News::Gone(object)),
            Err(error) if is_expired(&error) => return ready(Some(None)),
            Err(watcher::Error::InitialListFailed(error)) if is_missing(&error) => {
                if !std::mem::replace(&mut unknown, true) {
                    warn!(kind = %K::kind(&()), "the API server does not know such objects: is their CRD installed?");
                }
                Some(News::All(Vec::new()))
            }
            Err(error) => {
                warn!(%error, "what network policies are made of cannot be watched; what was heard goes on counting");
                None
            }
        };
        ready(news.map(|news| Some(heard(news))))
    });
    Box::pin(news)
}
