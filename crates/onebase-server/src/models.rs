use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use onebase_engine::{Facts, Listing};
use serde_json::{Value, json};

use crate::app::App;
use crate::auth::Caller;
use crate::error::ApiError;

fn base_card(app: &App) -> Value {
    let base = app.engine.registry().base();
    json!({
        "id": base.name(),
        "object": "model",
        "created": app.created,
        "owned_by": "onebase",
        "root": base.name(),
        "parent": null,
        "max_model_len": base.config().context_tokens,
    })
}

fn card(app: &App, listing: &Listing) -> Value {
    let base = app.engine.registry().base();
    json!({
        "id": listing.desired.name,
        "object": "model",
        "created": app.created,
        "owned_by": "onebase",
        "root": listing.facts.as_ref().map(|facts| facts.fine_tune.as_str()),
        "parent": base.name(),
        "max_model_len": base.config().context_tokens,
        "onebase": tenant_object(listing),
    })
}

/// What is known of a tenant.
pub(crate) fn tenant_object(listing: &Listing) -> Value {
    let facts = listing.facts.as_ref();
    let skill = facts.and_then(Facts::skill_kept);
    json!({
        "name": listing.desired.name,
        "generation": listing.desired.generation,
        "blake3": listing.desired.digest.map(|digest| digest.to_string()),
        "fine_tune": facts.map(|facts| facts.fine_tune.as_str()),
        "codecs": facts.map(|facts| &facts.codecs),
        "disk_bytes": facts.map(|facts| facts.sizes.total_bytes),
        "effective_bpw_linear": facts.map(|facts| facts.sizes.effective_bpw_linear()),
        "effective_bpw_total": facts.map(|facts| facts.sizes.effective_bpw_total()),
        "skill_kept": skill.map(|(task, kept)| json!({"task": task, "share": kept})),
        "resident_bytes": listing.resident_bytes,
        "in_use": listing.n_uses,
        "loads": listing.n_loads,
        "evictions": listing.n_evictions,
        "load_seconds": listing.load_time.as_secs_f64(),
        "failure": listing.failure.as_ref().map(|error| error.full()),
    })
}

/// `GET /v1/models`
pub(crate) async fn list(State(app): State<Arc<App>>, caller: Caller) -> Json<Value> {
    let tenants = app.engine.registry().list();
    let cards = tenants.iter().filter(|t| caller.may_ask(&t.desired.name)).map(|t| card(&app, t));
    let base =
        Some(base_card(&app)).filter(|_| caller.may_ask(app.engine.registry().base().name()));
    let data: Vec<Value> = base.into_iter().chain(cards).collect();
    Json(json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{model}`
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if !caller.may_ask(&name) {
        return Err(ApiError::no_model(&name));
    }
    let registry = app.engine.registry();
    if name == registry.base().name() {
        return Ok(Json(base_card(&app)));
    }
    Ok(Json(card(&app, &registry.listing(&name)?)))
}

/// Base, tenants and what they do now, for the page.
pub(crate) fn status_of(app: &App, caller: &Caller) -> Value {
    let registry = app.engine.registry();
    let metrics = app.engine.metrics();
    let live = |name: &str| {
        let tenant = metrics.tenants.get(name).cloned().unwrap_or_default();
        json!({
            "answered": tenant.n_answered,
            "failed": tenant.n_failed,
            "prompt_tokens": tenant.prompt_tokens,
            "new_tokens": tenant.new_tokens,
            "waiting": tenant.n_waiting,
            "running": tenant.n_running,
        })
    };
    let list = registry.list();
    let shown = list.iter().filter(|listing| caller.may_ask(&listing.desired.name));
    let tenants: Vec<Value> = shown
        .map(|listing| {
            let mut object = tenant_object(listing);
            object["live"] = live(&listing.desired.name);
            object
        })
        .collect();
    let base = registry.base();
    json!({
        "base": {
            "name": base.name(),
            "blake3": base.digest().to_string(),
            "context_tokens": base.config().context_tokens,
            "live": live(base.name()),
        },
        "tenants": tenants,
        "delta_bytes": registry.resident_bytes(),
        "delta_limit_bytes": registry.limit_bytes(),
        "kv_tokens": metrics.kv_tokens,
        "kv_limit_tokens": metrics.kv_limit_tokens,
        "overhead": metrics.overhead(),
        "can_change": caller.is_admin,
    })
}

/// `GET /status`
pub(crate) async fn status(State(app): State<Arc<App>>, caller: Caller) -> Json<Value> {
    Json(status_of(&app, &caller))
}
