//! The `Cni` service on the local socket, and what goes on beside it: tombstones, reaping, the conflist.

use super::{
    AddressError, Addresses, Allocation, Metrics, Node, Port, Ports, Readiness, Veth,
    answer::{self, Code, Failure},
    check, conflist,
    reap::{self, GRACE, Reaper},
    request, tombstone,
};
use crate::{linux::inotify::Watch, types::AttachmentKey};
use anyhow::Context;
use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    sync::{Mutex as AsyncMutex, watch},
    time,
};
use tonic::{Request, Response, Status};
use tracing::{debug, info, warn};
use weft_proto::local::{self, cni_server::Cni};

#[derive(Clone, Debug)]
pub struct Config {
    /// Tombstones lie in it.
    pub run_dir: PathBuf,
    /// Where the shim finds this service.
    pub socket: PathBuf,
    /// Where the conflist is written once the node is ready; none: nowhere.
    pub conf_dir: Option<PathBuf>,
}

/// Answers the shim. Clones share it.
#[derive(Debug)]
pub struct Service<A, P> {
    shared: Arc<Shared<A, P>>,
}

#[derive(Debug)]
struct Shared<A, P> {
    config: Config,
    addresses: A,
    ports: P,
    node: watch::Receiver<Option<Node>>,
    readiness: watch::Receiver<Readiness>,
    metrics: Metrics,
    reaper: Mutex<Reaper>,
    /// One call at a time for each attachment: an attachment's lock is picked by its hash.
    locks: [AsyncMutex<()>; 64],
    warnings: watch::Sender<Vec<String>>,
}

impl<A: Addresses, P: Ports> Service<A, P> {
    /// Serve it with `CniServer::new`, and spawn [`Service::run`] beside it.
    ///
    /// # Errors
    /// The tombstones' directory can't be made.
    pub fn new(
        config: Config,
        addresses: A,
        ports: P,
        node: watch::Receiver<Option<Node>>,
        readiness: watch::Receiver<Readiness>,
    ) -> anyhow::Result<Self> {
        let directory = tombstone::directory(&config.run_dir);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("make {}", directory.display()))?;
        let shared = Shared {
            config,
            addresses,
            ports,
            node,
            readiness,
            metrics: Metrics::new(),
            reaper: Mutex::default(),
            locks: std::array::from_fn(|_| AsyncMutex::new(())),
            warnings: watch::channel(Vec::new()).0,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// What a person should look at though ADD works.
    pub fn warnings(&self) -> watch::Receiver<Vec<String>> {
        self.shared.warnings.subscribe()
    }

    /// Works tombstones off as they appear, takes away what nobody speaks for, and writes the conflist once the node
    /// is ready. Runs until it is dropped.
    ///
    /// # Errors
    /// The tombstones' directory can't be watched.
    pub async fn run(self) -> anyhow::Result<()> {
        let directory = tombstone::directory(&self.shared.config.run_dir);
        let watch = Watch::new(&directory).with_context(|| {
            format!("watch {} (fs.inotify.max_user_instances may be too small)", directory.display())
        })?;
        let mut readiness = self.shared.readiness.clone();
        let mut written = self.shared.config.conf_dir.is_none();
        let mut tick = time::interval(GRACE / 2);
        tick.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            let ready = readiness.borrow_and_update().reasons.is_empty();
            written = written || ready && self.shared.publish_conflist();
            let again = time::sleep(WRITE_AGAIN);
            tokio::select! {
                changed = watch.changed() => {
                    changed.context("read inotify events")?;
                    self.shared.work_tombstones_off().await;
                }
                _ = tick.tick() => {
                    self.shared.work_tombstones_off().await;
                    self.shared.reap().await;
                }
                Ok(()) = readiness.changed(), if !written => {}
                () = again, if !written && ready => {}
            }
        }
    }
}

impl<A: Addresses, P: Ports> Service<A, P> {
    /// Takes attachments away whose pods do not exist (any more), as somebody found who began to look at `since`.
    pub async fn abandon(&self, keys: impl IntoIterator<Item = AttachmentKey>, since: Instant) {
        for key in keys {
            let _turn = self.shared.turn(&key).await;
            if self.shared.reaper().is_added(&key, since, Instant::now()) {
                continue;
            }
            match self.shared.take_away(&key).await {
                Ok(()) => {
                    warn!(attachment = %key, "taken away: its pod does not exist any more");
                    self.shared.metrics.reaped();
                }
                Err(failure) => warn!(attachment = %key, %failure, "can't take a dead pod's attachment away"),
            }
        }
    }
}

#[tonic::async_trait]
impl<A: Addresses, P: Ports> Cni for Service<A, P> {
    async fn reserve(
        &self,
        request: Request<local::ReserveRequest>,
    ) -> Result<Response<local::Reservation>, Status> {
        self.shared.answer("reserve", self.shared.reserve(request.into_inner()).await)
    }

    async fn activate(
        &self,
        request: Request<local::ActivateRequest>,
    ) -> Result<Response<local::ActivateReply>, Status> {
        let done = self.shared.activate(request.into_inner()).await;
        self.shared.answer("activate", done.map(|()| local::ActivateReply {}))
    }

    async fn release(
        &self,
        request: Request<local::ReleaseRequest>,
    ) -> Result<Response<local::ReleaseReply>, Status> {
        let done = self.shared.release(request.into_inner()).await;
        self.shared.answer("release", done.map(|()| local::ReleaseReply {}))
    }

    async fn check(
        &self,
        request: Request<local::CheckRequest>,
    ) -> Result<Response<local::CheckReply>, Status> {
        self.shared.answer("check", self.shared.check(request.into_inner()).await)
    }

    async fn gc(&self, request: Request<local::GcRequest>) -> Result<Response<local::GcReply>, Status> {
        self.shared.answer("gc", self.shared.gc(request.into_inner()).await)
    }

    async fn ready(&self, _: Request<local::ReadyRequest>) -> Result<Response<local::ReadyReply>, Status> {
        let ready = answer::ready(&self.shared.readiness.borrow());
        self.shared.answer("ready", ready.map(|()| local::ReadyReply {}))
    }
}

impl<A: Addresses, P: Ports> Shared<A, P> {
    fn answer<T>(&self, call: &'static str, done: Result<T, Failure>) -> Result<Response<T>, Status> {
        done.map(Response::new).map_err(|failure| {
            self.metrics.failed(call, &failure);
            debug!(call, code = failure.code as u32, %failure, details = failure.details, "refused");
            failure.into()
        })
    }

    async fn reserve(&self, request: local::ReserveRequest) -> Result<local::Reservation, Failure> {
        let wish = request::wish(request)?;
        let key = wish.attachment.clone();
        let node = answer::node(self.node.borrow().as_ref(), &self.readiness.borrow()).cloned()?;
        let _turn = self.turn(&key).await;
        // An older DEL of the same attachment must not hit the new one later.
        if self.tombstone(&key).exists() {
            self.take_away(&key).await?;
            self.bury(&self.tombstone(&key));
        }
        request::refuse_an_old_pod(&wish, &self.addresses.allocations().await?)?;
        let allocation = self.addresses.reserve(wish).await?;
        self.reaper().reserved(&key, Instant::now());
        match answer::reservation(&allocation, &node) {
            Ok(reservation) => Ok(reservation),
            Err(failure) => {
                self.take_away(&key).await?;
                Err(failure)
            }
        }
    }

    async fn activate(&self, request: local::ActivateRequest) -> Result<(), Failure> {
        let key = request::attachment(request.attachment)?;
        let _turn = self.turn(&key).await;
        // Before the port: from here on the reservation can't time out under it.
        let stands = self.addresses.activated(&key).await?;
        let allocation = self.allocation(&key).await?.filter(|_| stands);
        let Allocation { attachment, pod, addresses, mac, .. } = allocation.ok_or_else(|| {
            Failure::new(Code::UnknownContainer, format!("{key} has no reservation (any more)"))
        })?;
        let host_interface = attachment.host_interface();
        let port = Port { attachment, pod: pod.clone(), host_interface, addresses: addresses.clone(), mac };
        self.ports.attach(port).await?;
        if let Some(took) = self.reaper().activated(&key, Instant::now()) {
            self.metrics.added(took);
            info!(attachment = %key, %pod, ?addresses, ?took, "attached");
        }
        Ok(())
    }

    async fn release(&self, request: local::ReleaseRequest) -> Result<(), Failure> {
        let key = request::attachment(request.attachment)?;
        let _turn = self.turn(&key).await;
        self.take_away(&key).await?;
        info!(attachment = %key, "detached");
        Ok(())
    }

    async fn check(&self, request: local::CheckRequest) -> Result<local::CheckReply, Failure> {
        let key = request::attachment(request.attachment)?;
        let expected: Vec<_> = request.addresses.iter().filter_map(|text| text.parse().ok()).collect();
        let node = answer::node(self.node.borrow().as_ref(), &self.readiness.borrow()).cloned()?;
        let _turn = self.turn(&key).await;
        let allocation = self.allocation(&key).await?;
        let veths = self.ports.veths().await?;
        let veth = veths.iter().find(|veth| veth.alias.attachment == key);
        check::check(&key, &expected, allocation.as_ref(), veth)?;
        let reservation = allocation.map(|allocation| answer::reservation(&allocation, &node)).transpose()?;
        Ok(local::CheckReply { reservation })
    }

    async fn gc(&self, request: local::GcRequest) -> Result<local::GcReply, Failure> {
        let begun = Instant::now();
        let valid: BTreeSet<_> = request.valid.into_iter().map(|a| (a.container_id, a.ifname)).collect();
        let (allocations, veths) = self.inventory().await?;
        let (mut removed, mut failures) = (Vec::new(), Vec::new());
        for key in reap::collect(&valid, &allocations, &veths, SystemTime::now()) {
            let _turn = self.turn(&key).await;
            // An ADD may have come while we waited for our turn: the runtime's list is from before it.
            if self.reaper().is_added(&key, begun, Instant::now()) {
                continue;
            }
            match self.take_away(&key).await {
                Ok(()) => {
                    warn!(attachment = %key, "taken away: the runtime does not know it any more");
                    self.metrics.reaped();
                    let (container_id, ifname) = (key.container_id().to_string(), key.ifname().to_string());
                    removed.push(local::Attachment { container_id, ifname });
                }
                Err(failure) => failures.push(format!("{key}: {failure}")),
            }
        }
        match failures.is_empty() {
            true => Ok(local::GcReply { removed }),
            false => {
                let msg = format!("{} attachments could not be taken away", failures.len());
                Err(Failure::new(Code::KernelRefused, msg).with_details(failures.join("; ")))
            }
        }
    }

    /// The port first: while the veth lives, nobody else may get its address.
    async fn take_away(&self, key: &AttachmentKey) -> Result<(), Failure> {
        self.ports.detach(key).await?;
        self.addresses.release(key).await?;
        self.reaper().released(key);
        Ok(())
    }

    async fn allocation(&self, key: &AttachmentKey) -> Result<Option<Allocation>, AddressError> {
        Ok(self.addresses.allocations().await?.into_iter().find(|a| a.attachment == *key))
    }

    async fn inventory(&self) -> Result<(Vec<Allocation>, Vec<Veth>), Failure> {
        // Veths first: one that is made meanwhile is then not taken for an orphan.
        let veths = self.ports.veths().await?;
        Ok((self.addresses.allocations().await?, veths))
    }

    async fn reap(&self) {
        if self.node.borrow().is_none() {
            return;
        }
        let (allocations, veths) = match self.inventory().await {
            Ok(inventory) => inventory,
            Err(failure) => return warn!(%failure, "can't look for abandoned attachments"),
        };
        let dead = self.reaper().observe(&allocations, &veths, Instant::now());
        for key in dead {
            let _turn = self.turn(&key).await;
            // An ADD may have begun, or ended at last, while we waited for our turn.
            if !self.reaper().is_dead(&key, Instant::now()) {
                continue;
            }
            match self.take_away(&key).await {
                Ok(()) => {
                    warn!(attachment = %key, "taken away: never activated, or its interface is gone");
                    self.metrics.reaped();
                }
                Err(failure) => warn!(attachment = %key, %failure, "can't take an abandoned attachment away"),
            }
        }
    }

    async fn work_tombstones_off(&self) {
        let directory = tombstone::directory(&self.config.run_dir);
        let files = match file_names(&directory) {
            Ok(files) => files,
            Err(error) => return warn!(directory = %directory.display(), %error, "can't read the tombstones"),
        };
        for name in files.into_iter().filter(|name| tombstone::is_finished(name)) {
            let path = directory.join(&name);
            let Ok(text) = fs::read_to_string(&path) else { continue };
            let Some(key) = tombstone::parse(&name, &text) else {
                warn!(path = %path.display(), "not a tombstone: removed");
                self.bury(&path);
                continue;
            };
            let _turn = self.turn(&key).await;
            // A new ADD may have worked it off while we waited for our turn.
            if !path.exists() {
                continue;
            }
            match self.take_away(&key).await {
                Ok(()) => {
                    info!(attachment = %key, "detached, as its tombstone asks");
                    self.bury(&path);
                }
                Err(failure) => warn!(attachment = %key, %failure, "tombstone stays for the next try"),
            }
        }
    }

    fn tombstone(&self, key: &AttachmentKey) -> PathBuf {
        tombstone::directory(&self.config.run_dir).join(tombstone::file_name(key))
    }

    fn bury(&self, path: &Path) {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(path = %path.display(), %error, "can't remove a tombstone");
            }
            _ => {}
        }
    }

    /// False where the conflist could not be written.
    fn publish_conflist(&self) -> bool {
        let Some(directory) = &self.config.conf_dir else { return true };
        let written = write_conflist(directory, &self.config.socket, &self.config.run_dir);
        let warnings = match &written {
            Ok(winners) => {
                let path = |file: &String| directory.join(file).display().to_string();
                let before = |file| {
                    format!("the runtime takes {} before {}: move it away", path(file), conflist::FILE_NAME)
                };
                winners.iter().map(before).collect()
            }
            Err(error) => {
                let path = directory.join(conflist::FILE_NAME);
                vec![format!("pods can't start: write {}: {error}", path.display())]
            }
        };
        self.warnings.send_if_modified(|told| {
            let changed = *told != warnings;
            if changed {
                warnings.iter().for_each(|warning| warn!("{warning}"));
                *told = warnings;
            }
            changed
        });
        written.is_ok()
    }

    async fn turn(&self, key: &AttachmentKey) -> tokio::sync::MutexGuard<'_, ()> {
        let name = key.host_interface();
        let hash = name.bytes().fold(0usize, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        self.locks[hash % self.locks.len()].lock().await
    }

    fn reaper(&self) -> MutexGuard<'_, Reaper> {
        self.reaper.lock().expect("no holder of this lock panics")
    }
}

/// Writes the conflist by rename, if it is not there already, and returns the files that a runtime takes before it.
///
/// # Errors
/// The directory is not there or not writable.
pub fn write_conflist(directory: &Path, socket: &Path, run_dir: &Path) -> io::Result<Vec<String>> {
    let text = conflist::text(socket, run_dir);
    let (temporary, path) = (directory.join(conflist::TEMPORARY_NAME), directory.join(conflist::FILE_NAME));
    if fs::read_to_string(&path).ok().as_deref() != Some(&text) {
        let mut file = fs::File::create(&temporary)?;
        // Whatever the umask says: it is no secret, and who reads it need not be root.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        info!(path = %path.display(), "conflist written: the runtime may attach pods");
    }
    Ok(conflist::winners(file_names(directory)?))
}

fn file_names(directory: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(directory)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.collect())
}

impl<A, P> Clone for Service<A, P> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

/// How long to wait before a conflist that could not be written is tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(2);
