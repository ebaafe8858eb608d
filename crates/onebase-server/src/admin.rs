//! Changing tenants, in this server's own words and in those of vLLM's routes, which routers and
//! controllers speak.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::auth::{Admin, Caller};
use crate::error::ApiError;
use crate::extract::Body;
use crate::models::{status_of, tenant_object};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PutBody {
    source: PathBuf,
    expected_generation: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeleteQuery {
    expected_generation: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadAdapter {
    lora_name: String,
    lora_path: PathBuf,
    #[serde(default)]
    load_inplace: bool,
}

#[derive(Deserialize)]
pub(crate) struct UnloadAdapter {
    lora_name: String,
    /// vLLM's number of the adapter, which says nothing here.
    #[serde(default)]
    #[allow(dead_code)]
    lora_int_id: Option<u64>,
}

async fn load(
    app: &Arc<App>,
    name: String,
    source: PathBuf,
    expected: Option<u64>,
) -> Result<Value, ApiError> {
    let source = match &app.deltas {
        Some(deltas) => deltas.join(source),
        None => source,
    };
    let until = Instant::now() + app.limits.load_time;
    let shared = Arc::clone(app);
    app.blocking(move || {
        let registry = shared.engine.registry();
        let source = std::path::absolute(&source).unwrap_or(source);
        let listing = registry.load(&name, &source, expected, until)?;
        save(&shared, &name)?;
        Ok(tenant_object(&listing))
    })
    .await
}

async fn unload(app: &Arc<App>, name: String, expected: Option<u64>) -> Result<(), ApiError> {
    let shared = Arc::clone(app);
    app.blocking(move || {
        shared.engine.registry().unload(&name, expected)?;
        save(&shared, &name)
    })
    .await
}

fn save(app: &App, changed: &str) -> Result<(), ApiError> {
    let Some(state) = &app.state else { return Ok(()) };
    state.save(app.engine.registry(), Some(changed)).map_err(|error| {
        let message = format!("the change is made, but will not outlive the server: {error}");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).code("state_not_saved")
    })
}

/// `GET /admin/tenants`
pub(crate) async fn list(State(app): State<Arc<App>>, _: Admin, caller: Caller) -> Json<Value> {
    Json(status_of(&app, &caller))
}

/// `PUT /admin/tenants/{name}`
pub(crate) async fn put(
    State(app): State<Arc<App>>,
    _: Admin,
    Path(name): Path<String>,
    Body(body): Body<PutBody>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(load(&app, name, body.source, body.expected_generation).await?))
}

/// `DELETE /admin/tenants/{name}`
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    _: Admin,
    Path(name): Path<String>,
    query: Result<Query<DeleteQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::bad_request(e.body_text()))?;
    unload(&app, name.clone(), query.expected_generation).await?;
    Ok(Json(json!({"name": name, "unloaded": true})))
}

/// `POST /v1/load_lora_adapter`
pub(crate) async fn load_adapter(
    State(app): State<Arc<App>>,
    _: Admin,
    Body(body): Body<LoadAdapter>,
) -> Result<String, ApiError> {
    let name = body.lora_name;
    let expected = if body.load_inplace { None } else { Some(0) };
    let loaded = load(&app, name.clone(), body.lora_path, expected).await;
    loaded.map_err(|error| {
        if error.status == StatusCode::CONFLICT && !body.load_inplace {
            let message = format!("the adapter {name:?} has already been loaded");
            return ApiError::parameter("lora_name", message);
        }
        error
    })?;
    Ok(format!("Success: LoRA adapter '{name}' added successfully."))
}

/// `POST /v1/unload_lora_adapter`
pub(crate) async fn unload_adapter(
    State(app): State<Arc<App>>,
    _: Admin,
    Body(body): Body<UnloadAdapter>,
) -> Result<String, ApiError> {
    let name = body.lora_name;
    unload(&app, name.clone(), None).await?;
    Ok(format!("Success: LoRA adapter '{name}' removed successfully."))
}
