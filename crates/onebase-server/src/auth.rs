use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use onebase_format::Digest;
use serde::Deserialize;

use crate::app::App;
use crate::error::ApiError;

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is malformed.
    #[error("{}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A key is short enough to be guessed, or is there twice.
    #[error("{}: key of {name:?} {problem}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Whose key.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Fewest characters of a key.
const KEY_CHARS: usize = 8;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    admin: Option<String>,
    #[serde(default)]
    keys: Vec<KeyRecord>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyRecord {
    name: String,
    key: String,
    tenants: Option<BTreeSet<String>>,
    requests_per_minute: Option<f64>,
    tokens_per_minute: Option<f64>,
}

/// Who may ask whom, how much, and who may change tenants.
///
/// Keys are kept as digests, so that looking one up tells nothing by the time it takes.
#[derive(Debug, Default)]
pub struct Keys {
    admin: Option<Digest>,
    callers: BTreeMap<Digest, Arc<Account>>,
    /// Whether, without an admin's key, everybody is the admin.
    is_local: bool,
}

impl Keys {
    /// Everybody may ask; where `is_local` holds, everybody may change tenants too.
    pub fn none(is_local: bool) -> Self {
        Self { is_local, ..Self::default() }
    }

    /// The keys of a file of JSON:
    /// `{"admin": "…", "keys": [{"name": "…", "key": "…", "tenants": ["…"],
    /// "requests_per_minute": 60, "tokens_per_minute": 10000}]}`. All but name and key of a key
    /// may be left out: it is for all tenants and without a quota then.
    ///
    /// # Errors
    /// When the file cannot be read, is malformed, or a key is too short or there twice.
    pub fn read(path: &Path, is_local: bool) -> Result<Self, KeysError> {
        let at = || path.to_owned();
        let bytes = std::fs::read(path);
        let bytes = bytes.map_err(|source| KeysError::Read { path: at(), source })?;
        let file: KeyFile = serde_json::from_slice(&bytes)
            .map_err(|source| KeysError::Json { path: at(), source })?;
        let mut keys = Self::none(is_local);
        let bad =
            |name: &str, problem| KeysError::Key { path: at(), name: name.to_owned(), problem };
        if let Some(admin) = &file.admin {
            if admin.chars().count() < KEY_CHARS {
                return Err(bad("admin", "has fewer than 8 characters"));
            }
            keys.admin = Some(Digest::of(admin.as_bytes()));
        }
        for record in file.keys {
            if record.key.chars().count() < KEY_CHARS {
                return Err(bad(&record.name, "has fewer than 8 characters"));
            }
            let digest = Digest::of(record.key.as_bytes());
            let name = record.name.clone();
            if keys.callers.insert(digest, Arc::new(Account::new(record))).is_some() {
                return Err(bad(&name, "is another one's too"));
            }
        }
        Ok(keys)
    }

    /// Sets the admin's key.
    pub fn set_admin(&mut self, key: &str) {
        self.admin = Some(Digest::of(key.as_bytes()));
    }

    /// Whether somebody can change tenants.
    pub fn has_admin(&self) -> bool {
        self.admin.is_some() || self.is_local
    }

    fn is_admin(&self, key: Option<Digest>) -> bool {
        match self.admin {
            Some(admin) => key == Some(admin),
            None => {
                self.is_local
                    && (self.callers.is_empty()
                        || key.is_some_and(|k| self.callers.contains_key(&k)))
            }
        }
    }
}

/// A key's tenants and what is left of its quotas.
#[derive(Debug)]
struct Account {
    name: String,
    tenants: Option<BTreeSet<String>>,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
}

impl Account {
    fn new(record: KeyRecord) -> Self {
        let bucket = |per_minute: Option<f64>| per_minute.map(|n| Mutex::new(Bucket::new(n)));
        Self {
            name: record.name,
            tenants: record.tenants,
            requests: bucket(record.requests_per_minute),
            tokens: bucket(record.tokens_per_minute),
        }
    }
}

/// A quota that fills up evenly, a minute's worth at most.
#[derive(Debug)]
struct Bucket {
    per_minute: f64,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_minute: f64) -> Self {
        let per_minute = if per_minute.is_finite() { per_minute.max(0.0) } else { 0.0 };
        Self { per_minute, left: per_minute, at: Instant::now() }
    }

    fn fill(&mut self) {
        let now = Instant::now();
        let more = (now - self.at).as_secs_f64() / 60.0 * self.per_minute;
        (self.left, self.at) = ((self.left + more).min(self.per_minute), now);
    }

    /// Takes `cost`, if `least` is left; else says how long that will take.
    fn take(&mut self, least: f64, cost: f64) -> Result<(), Duration> {
        self.fill();
        if self.left >= least {
            self.left -= cost;
            return Ok(());
        }
        let seconds = 60.0 * (least - self.left) / self.per_minute;
        Err(Duration::from_secs_f64(if seconds.is_finite() { seconds.min(3600.0) } else { 3600.0 }))
    }
}

fn locked(bucket: &Mutex<Bucket>) -> std::sync::MutexGuard<'_, Bucket> {
    bucket.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who asks.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    account: Option<Arc<Account>>,
    pub(crate) is_admin: bool,
}

impl Caller {
    pub(crate) fn may_ask(&self, model: &str) -> bool {
        let tenants = self.account.as_ref().and_then(|account| account.tenants.as_ref());
        tenants.is_none_or(|tenants| tenants.contains(model))
    }

    /// Counts a request, if its quotas allow one.
    pub(crate) fn begin(&self) -> Result<(), ApiError> {
        let Some(account) = &self.account else { return Ok(()) };
        let refused = |what: &str, after| {
            let message = format!("key {:?} has used up its {what} per minute", account.name);
            Err(ApiError::too_many(message, after).code("rate_limit_exceeded"))
        };
        if let Some(Err(after)) = account.tokens.as_ref().map(|b| locked(b).take(1.0, 0.0)) {
            return refused("tokens", after);
        }
        match account.requests.as_ref().map(|b| locked(b).take(1.0, 1.0)) {
            Some(Err(after)) => refused("requests", after),
            _ => Ok(()),
        }
    }

    /// Counts tokens; a quota may be overdrawn by the request that meets its end.
    pub(crate) fn spend(&self, n_tokens: usize) {
        if let Some(tokens) = self.account.as_ref().and_then(|account| account.tokens.as_ref()) {
            #[allow(clippy::cast_precision_loss)]
            let cost = n_tokens as f64;
            let _ = locked(tokens).take(f64::NEG_INFINITY, cost);
        }
    }
}

fn presented(parts: &Parts) -> Option<Digest> {
    let value = parts.headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    let is_bearer = scheme.eq_ignore_ascii_case("bearer");
    is_bearer.then(|| Digest::of(key.trim().as_bytes()))
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let (key, keys) = (presented(parts), &app.keys);
        let is_admin = keys.is_admin(key);
        let account = key.and_then(|key| keys.callers.get(&key)).cloned();
        if account.is_none() && !is_admin && !keys.callers.is_empty() {
            let message = "expected an API key of this server as `Authorization: Bearer KEY`";
            let error = ApiError::new(StatusCode::UNAUTHORIZED, message);
            return Err(error.code("invalid_api_key"));
        }
        Ok(Self { account, is_admin })
    }
}

/// Whether a request was sent to an address, or to this machine by its own name. A page of
/// another site that has its name point here is told apart by that name.
fn is_addressed_here(parts: &Parts) -> bool {
    let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = host.unwrap_or_default();
    let without_port = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let is_address = |text: &str| text.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    [host, without_port]
        .iter()
        .any(|name| name.eq_ignore_ascii_case("localhost") || is_address(name))
}

/// One who may change tenants.
pub(crate) struct Admin;

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let is_keyless = app.keys.admin.is_none();
        if is_keyless && app.keys.is_local && !is_addressed_here(parts) {
            let message = "without an admin key, tenants are changed at localhost or an address";
            return Err(ApiError::new(StatusCode::FORBIDDEN, message));
        }
        if app.keys.is_admin(presented(parts)) {
            return Ok(Self);
        }
        if !app.keys.has_admin() {
            let message = "tenants cannot be changed: the server has no admin key, and listens \
                           to more than this machine";
            return Err(ApiError::new(StatusCode::FORBIDDEN, message));
        }
        let message = "expected the admin's key as `Authorization: Bearer KEY`";
        Err(ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key"))
    }
}
