//! One server's parts, built in the order of the map.
//!
//! Invariant: only this file builds. A part is handed what it uses, so that no part can reach
//! another that it was not given.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{
    reload::{Reload, ReloadError},
    settings::{Config, Drain},
};
use crate::{
    access::{Access, Rules},
    admin::{self, Busiest},
    auth::{self, Authenticator, KeyFollower, jwks::JwksError},
    db::{self, Pool},
    http::{self, Bodies, Visits},
    hub::{Hub, OutboxBounds, Reliever, Sockets},
    invalidation::{Feeds, Sender},
    limits::Limits,
    policies::Policies,
    publish::Publisher,
    recovery::{Healer, Recovery},
    relay::{self, LinkStatus, Listens, Places, Relay},
    socket,
    telemetry::metrics::Registry,
    upkeep::{self, RevocationReader, Sharing, Survey},
};

/// Everything that one server is made of.
#[derive(Debug)]
pub struct Gateway {
    /// Names this process among the gateways of its database.
    pub(crate) id: Uuid,
    pub(super) drain: Drain,
    /// Where all metrics are registered.
    pub registry: Arc<Registry>,
    /// Who a client is.
    pub auth: Arc<Authenticator>,
    /// Who may do what.
    pub access: Arc<Access>,
    pub(crate) limits: Arc<Limits>,
    /// Who hears which topic.
    pub hub: Arc<Hub>,
    /// The open sockets.
    pub sockets: Arc<Sockets>,
    pub(crate) feeds: Arc<Feeds>,
    pub(crate) recovery: Arc<Recovery>,
    /// What the database lets a token do on private channels.
    pub policies: Arc<Policies>,
    pub(super) pool: Option<Pool>,
    /// What all sockets share.
    pub socket: Arc<socket::Shared>,
    pub(crate) http: Arc<http::Shared>,
    pub(super) admin: Arc<admin::Shared>,
    pub(super) reload: Arc<Reload>,
    /// Runs the sockets' tasks.
    pub(super) connections: TaskTracker,
    /// Runs all other tasks.
    pub(super) tasks: TaskTracker,
    /// Cancelled when the drain begins: nothing new is taken.
    pub draining: CancellationToken,
    /// Cancelled when the sockets are gone: everything ends.
    pub(super) stopped: CancellationToken,
}

/// The tasks of one server, which do not run yet.
#[derive(Debug)]
pub(super) struct Tasks {
    pub(super) relay: Option<Relay>,
    pub(super) sharing: Option<Sharing>,
    pub(super) survey: Option<Survey>,
    pub(super) revocations: Option<RevocationReader>,
    pub(super) keys: KeyFollower,
    pub(super) sender: Sender,
    pub(super) healer: Healer,
    pub(super) reliever: Reliever,
}

impl Gateway {
    /// Builds what the settings ask for; nothing runs yet.
    ///
    /// # Errors
    /// [`JwksError`] if there is a key set's file and it cannot be used.
    pub fn new(config: Config) -> Result<Arc<Self>, JwksError> {
        Self::build(config).map(|(gateway, _)| gateway)
    }

    /// Reads the settings again and takes over rules and keys; other settings wait for the next
    /// start.
    ///
    /// # Errors
    /// [`ReloadError`]; everything is as before.
    pub fn reload(&self) -> Result<(), ReloadError> {
        self.reload.reload()
    }

    /// As [`Self::new`], with the tasks.
    #[expect(clippy::too_many_lines, reason = "a list, one entry a part")]
    pub(super) fn build(config: Config) -> Result<(Arc<Self>, Tasks), JwksError> {
        let registry = Arc::new(Registry::new());
        let (draining, stopped) = (CancellationToken::new(), CancellationToken::new());
        let (connections, tasks) = (TaskTracker::new(), TaskTracker::new());
        let id = Uuid::new_v4();

        let auth = Authenticator::new(&config.trust(), auth::Metrics::new(&registry))?;
        let auth = Arc::new(auth);
        let rules = Rules::new(config.topic.clone(), config.topics);
        let access = Arc::new(Access::new(rules));
        let limits =
            Arc::new(Limits::new(config.limits.clone(), config.network.clone(), &registry));
        let hub = Arc::new(Hub::new(&registry));
        let sockets = Arc::new(Sockets::new(
            config.limits.connections_max,
            OutboxBounds::new(config.limits.outbox_bytes_max, config.limits.outboxes_bytes()),
            draining.clone(),
            &registry,
        ));
        let feeds = Arc::new(Feeds::new(config.relay.listens_max, Arc::clone(&hub), &registry));
        let recovery = Arc::new(Recovery::new(
            config.limits.silence_timeout,
            Arc::clone(&auth),
            Arc::clone(&access),
            Arc::clone(&hub),
            Arc::clone(&feeds),
            &registry,
        ));
        let publisher = Arc::new(Publisher::new(Arc::clone(&hub), Arc::clone(&feeds)));

        // The settings' check has read the URLs.
        let pool = db::pool(config.pool_url(), config.relay.connect_timeout).ok();
        let options = Some(config.pool_url()).filter(|url| !url.is_empty());
        let options = options.and_then(|url| db::options(url).ok());
        let policies = Arc::new(Policies::new(&config.policies, options, &registry, tasks.clone()));
        let link_metrics = Arc::new(relay::Metrics::new(&registry));
        let link = Arc::new(LinkStatus::new(Arc::clone(&link_metrics)));
        let listens = (!config.notify_url().is_empty()).then(|| {
            let places = Places {
                max: config.relay.listens_max,
                per_address_max: config.relay.listens_per_address_max,
            };
            let (refused, waiting) =
                (link_metrics.listens_refused.clone(), link_metrics.waiting.clone());
            Arc::new(Listens::new(places, config.relay.listen_wait, refused, waiting))
        });
        let relay = listens.as_ref().map(|listens| {
            Relay::new(relay::Parts {
                settings: config.relay.clone(),
                url: config.notify_url().clone(),
                pool: pool.clone(),
                gateway: id,
                history_keep: config.history.keep,
                payload_bytes_max: config.limits.payload_bytes_max,
                metrics: link_metrics,
                link: Arc::clone(&link),
                listens: Arc::clone(listens),
                access: Arc::clone(&access),
                hub: Arc::clone(&hub),
                feeds: Arc::clone(&feeds),
                recovery: Arc::clone(&recovery),
                publisher: Arc::clone(&publisher),
                auth: Arc::clone(&auth),
            })
        });
        let survey_metrics = Arc::new(upkeep::Metrics::new(&registry));
        let sharing = pool.clone().map(|pool| Sharing {
            settings: config.history.clone(),
            pool,
            gateway: id,
            recovery: Arc::clone(&recovery),
            interval: config.relay.canary_interval,
            timeout: config.relay.connect_timeout,
        });
        let survey = pool.clone().map(|pool| Survey {
            pool,
            metrics: survey_metrics,
            interval: config.metrics.database_interval,
            timeout: config.relay.connect_timeout,
        });
        let revocations = pool.clone().map(|pool| RevocationReader {
            pool,
            auth: Arc::clone(&auth),
            sockets: Arc::clone(&sockets),
            timeout: config.relay.connect_timeout,
        });

        let socket = Arc::new(socket::Shared {
            settings: config.protocol,
            metrics: socket::Metrics::new(&registry),
            auth: Arc::clone(&auth),
            access: Arc::clone(&access),
            policies: Arc::clone(&policies),
            limits: Arc::clone(&limits),
            hub: Arc::clone(&hub),
            feeds: Arc::clone(&feeds),
            listens: listens.clone(),
            recovery: Arc::clone(&recovery),
            publisher: Arc::clone(&publisher),
            draining: draining.clone(),
        });
        let visits = Arc::new(Visits::default());
        let http = Arc::new(http::Shared {
            metrics: http::Metrics::new(&registry),
            auth: Arc::clone(&auth),
            access: Arc::clone(&access),
            policies: Arc::clone(&policies),
            limits: Arc::clone(&limits),
            sockets: Arc::clone(&sockets),
            publisher,
            socket: Arc::clone(&socket),
            bodies: Bodies::default(),
            visits: Arc::clone(&visits),
            tasks: connections.clone(),
            draining: draining.clone(),
            stopped: stopped.clone(),
        });
        let reload = Arc::new(Reload::new(
            Arc::clone(&auth),
            Arc::clone(&access),
            Arc::clone(&sockets),
            &registry,
        ));
        let reloading = Arc::clone(&reload);
        let metrics = admin::Metrics::new(&registry);
        if let Some(pool) = &pool {
            metrics.pool_max.set(pool.options().get_max_connections().into());
        }
        let admin = Arc::new(admin::Shared {
            metrics,
            registry: Arc::clone(&registry),
            admin_token: config.admin_token.clone(),
            events_max: config.metrics.events_max,
            busiest: Mutex::new(Busiest::default()),
            auth: Arc::clone(&auth),
            access: Arc::clone(&access),
            limits: Arc::clone(&limits),
            hub: Arc::clone(&hub),
            sockets: Arc::clone(&sockets),
            feeds: Arc::clone(&feeds),
            visits,
            listens,
            link,
            canary_interval: config.relay.canary_interval,
            pool: pool.clone(),
            database_timeout: config.relay.connect_timeout,
            reload: Box::new(move || Ok(reloading.reload()?)),
            draining: draining.clone(),
            stopped: stopped.clone(),
        });
        let work = Tasks {
            relay,
            sharing,
            survey,
            revocations,
            keys: KeyFollower::new(Arc::clone(&auth)),
            sender: feeds.sender(),
            healer: recovery.healer(),
            reliever: Reliever(Arc::clone(&sockets)),
        };
        let gateway = Self {
            id,
            drain: config.drain,
            registry,
            auth,
            access,
            limits,
            hub,
            sockets,
            feeds,
            recovery,
            policies,
            pool,
            socket,
            http,
            admin,
            reload,
            connections,
            tasks,
            draining,
            stopped,
        };
        Ok((Arc::new(gateway), work))
    }
}
