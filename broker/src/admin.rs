//! The admin listener: health, readiness, metrics and a live page.

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::fabric::Fabric;

/// Serves until the broker stops.
pub(crate) async fn serve(fabric: Arc<Fabric>, listener: TcpListener) {
    let stopped = fabric.shutdown.clone();
    let app = Router::new()
        .route("/", get(page))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/api/status", get(status))
        .with_state(fabric);
    let served = axum::serve(listener, app)
        .with_graceful_shutdown(async move { stopped.cancelled().await })
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the admin listener failed");
    }
}

async fn ready(State(fabric): State<Arc<Fabric>>) -> impl IntoResponse {
    if fabric.shutdown.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
    } else {
        (StatusCode::OK, "ready\n")
    }
}

async fn metrics(State(fabric): State<Arc<Fabric>>) -> impl IntoResponse {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [(header::CONTENT_TYPE, content_type)],
        fabric.metrics.encode(),
    )
}

async fn page() -> Html<&'static str> {
    Html(include_str!("admin/page.html"))
}

/// What the live page shows.
async fn status(State(fabric): State<Arc<Fabric>>) -> Json<Value> {
    let metrics = &fabric.metrics;
    let tenants: Vec<Value> = fabric
        .tenants()
        .iter()
        .map(|tenant| {
            let sessions = tenant.sessions();
            let mut shown: Vec<Value> = sessions
                .iter()
                .take(500)
                .map(|session| {
                    json!({
                        "identity": session.key.identity.uri(),
                        "name": &*session.key.name,
                        "online": session.is_online(),
                        "subscriptions": session.subscription_count(),
                        "queued_bytes": session.shared.iter().map(|queue| queue.bytes()).sum::<usize>(),
                    })
                })
                .collect();
            shown.sort_by_key(|session| session["identity"].as_str().unwrap_or_default().to_owned());
            json!({
                "tenant": &*tenant.name,
                "session_count": sessions.len(),
                "sessions": shown,
                "retained": tenant.retained.len(),
                "services": tenant.services.list().iter()
                    .map(|(name, responders)| json!({"service": name.as_str(), "responders": responders}))
                    .collect::<Vec<_>>(),
                "models": tenant.models.list().iter()
                    .flat_map(|(name, workers)| workers.iter().map(|worker| json!({
                        "model": name.as_str(),
                        "version": worker.version,
                        "worker": worker.identity.uri(),
                        "tier": worker.tier.as_str(),
                        "slots": worker.slots(),
                        "outstanding": worker.load().outstanding(),
                        "service_ms": worker.load().service_time().as_secs_f64() * 1e3,
                    })).collect::<Vec<_>>())
                    .collect::<Vec<_>>(),
            })
        })
        .collect();
    Json(json!({
        "broker": &*fabric.name,
        "version": env!("CARGO_PKG_VERSION"),
        "identity": fabric.identity.uri(),
        "uptime_s": fabric.started.elapsed().as_secs(),
        "messages_in": metrics.messages_in.get(),
        "messages_out": metrics.messages_out.get(),
        "sessions": metrics.sessions.get(),
        "subscriptions": metrics.subscriptions.get(),
        "dropped": {
            "queue_full": metrics.dropped_overflow.get(),
            "offline": metrics.dropped_offline.get(),
            "expired": metrics.dropped_expired.get(),
            "session_ended": metrics.dropped_session_ended.get(),
        },
        "calls_in_flight": metrics.calls_in_flight.get(),
        "escalations": metrics.escalations.get(),
        "tenants": tenants,
    }))
}
