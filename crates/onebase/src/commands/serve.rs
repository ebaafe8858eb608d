use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use onebase_engine::{Desired, Engine, Error, Listing, Options, Registry};
use onebase_format::Checkpoint;
use onebase_model::Model;
use onebase_server::{
    App, Found, Keys, Limits, Listen, Saved, StateFile, Traces, find_tenants, serve,
};
use serde_json::json;
use tokio::net::TcpListener;

use crate::args::ServeArgs;
use crate::output::{Output, bytes, percent, table};

/// How long reading one tenant may wait for others at the start.
const LOAD_TIME: Duration = Duration::from_secs(120);

pub(crate) fn run(args: &ServeArgs, threads: usize, output: &Output) -> anyhow::Result<()> {
    let address = SocketAddr::new(args.host, args.port);
    // Before minutes of reading.
    let listener = std::net::TcpListener::bind(address);
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true).context("cannot set up the listener")?;
    let keys = keys(args)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the server's threads")?;
    // An empty variable counts as none, as OpenTelemetry has it.
    let endpoint = args.otlp_traces_endpoint.as_ref().filter(|url| !url.is_empty());
    let traces = endpoint.map(|url| Traces::to(url, runtime.handle().clone())).transpose()?;
    let engine = engine(args, threads)?;
    let base = engine.registry().base().digest();
    let state = args.state.as_ref().map(|folder| StateFile::open(folder, base)).transpose()?;
    let (state, saved) = state.map_or_else(|| (None, Saved::default()), |(f, s)| (Some(f), s));
    take_up(args, engine.registry(), saved)?;
    read_all(engine.registry());
    if let Some(state) = &state {
        state.save(engine.registry(), None)?;
    }
    let limits = Limits {
        answer_tokens: args.max_tokens,
        request_time: Duration::from_secs(args.request_seconds as u64),
        ..Limits::default()
    };
    let mut app = App::new(engine, keys, limits, state, args.deltas.clone());
    if let Some(traces) = traces {
        app.set_traces(traces);
    }
    let app = Arc::new(app);
    runtime.block_on(async {
        let listener = TcpListener::from_std(listener).context("cannot listen")?;
        let address = listener.local_addr().context("cannot listen")?;
        print(&app, address, output)?;
        let clean = serve(listener, Arc::clone(&app), Listen::default(), stopped()).await;
        if let Some(traces) = app.traces() {
            tokio::task::block_in_place(|| traces.stop());
        }
        let end = if clean { "all requests were answered" } else { "some requests were cut off" };
        Output::note(&format!("stopped; {end}"));
        Ok(())
    })
}

/// The keys, of which an admin's is needed where more than this machine can reach the port.
fn keys(args: &ServeArgs) -> anyhow::Result<Keys> {
    let is_local = args.host.is_loopback();
    let mut keys = match &args.api_keys {
        Some(path) => Keys::read(path, is_local)?,
        None => Keys::none(is_local),
    };
    if let Some(key) = &args.admin_key {
        keys.set_admin(key);
    }
    if !keys.has_admin() {
        Output::note(
            "tenants cannot be changed while it runs: give --admin-key, as more than this \
             machine can reach the port",
        );
    }
    Ok(keys)
}

fn engine(args: &ServeArgs, threads: usize) -> anyhow::Result<Engine> {
    let model = Model::load(Checkpoint::open(&args.base)?)?;
    let base_name = args.name.clone().unwrap_or_else(|| model.checkpoint().name());
    let options = Options {
        base_name,
        threads,
        max_batch: args.max_batch,
        step_tokens: args.step_tokens,
        kv_bytes: args.kv_bytes,
        delta_bytes: args.delta_bytes,
        queue: args.queue,
    };
    Ok(Engine::start(model, &options)?)
}

/// Gives the registry its tenants: what an earlier server kept comes first, then what flags and
/// folders name, but for what was unloaded since; a flag brings that back.
fn take_up(args: &ServeArgs, registry: &Registry, saved: Saved) -> anyhow::Result<()> {
    registry.continue_after(saved.last_generation);
    let mut taken = BTreeSet::new();
    for desired in saved.tenants {
        taken.insert(desired.name.clone());
        registry.restore(desired)?;
    }
    let mut found = Vec::new();
    for folder in args.deltas.iter().chain(&args.family) {
        found.extend(
            find_tenants(folder)?.into_iter().filter(|f| !saved.unloaded.contains(&f.name)),
        );
    }
    let named = args.named.iter();
    found.extend(named.map(|d| Found { name: d.name.clone(), source: d.artifact.clone() }));
    for Found { name, source } in found {
        let source = std::path::absolute(&source)
            .with_context(|| format!("cannot tell where {} is", source.display()))?;
        if !taken.insert(name.clone()) {
            note_taken(registry, &name, &source);
            continue;
        }
        registry.restore(Desired { name, source, digest: None, generation: 0 })?;
    }
    Ok(())
}

fn note_taken(registry: &Registry, name: &str, source: &std::path::Path) {
    let is_other = registry.listing(name).is_ok_and(|listing| listing.desired.source != source);
    if is_other {
        Output::note(&format!(
            "tenant {name}: {} is not served, another artifact has the name",
            source.display()
        ));
    }
}

/// Reads tenants until the memory for them is full; says which could not be read.
fn read_all(registry: &Arc<Registry>) {
    for listing in registry.list() {
        let disk = listing.facts.map_or(0, |facts| facts.sizes.total_bytes);
        let needed = registry.resident_bytes() as u64 + disk;
        if needed > registry.limit_bytes() as u64 {
            continue;
        }
        let name = listing.desired.name;
        match registry.lease(&name, Instant::now() + LOAD_TIME) {
            Ok(_) | Err(Error::NoRoom { .. }) => {}
            Err(error) => Output::note(&format!("warning: {}", error.full())),
        }
    }
}

fn print(app: &App, address: SocketAddr, output: &Output) -> anyhow::Result<()> {
    let registry = app.engine().registry();
    let list = registry.list();
    let url = format!("http://{address}");
    let tenants: Vec<_> = list
        .iter()
        .map(|tenant| {
            json!({
                "name": tenant.desired.name,
                "generation": tenant.desired.generation,
                "source": tenant.desired.source,
                "resident_bytes": tenant.resident_bytes,
                "failure": tenant.failure.as_ref().map(|error| error.full()),
            })
        })
        .collect();
    let object = json!({"url": url, "base": registry.base().name(), "tenants": tenants});
    output.result(&object, || {
        let header = ["tenant", "codecs", "on disk", "bits/weight", "skill kept", "memory"];
        let rows = list.iter().map(row).collect();
        format!(
            "{}\n{} of {} for tenants in use; base {}\nlistening on {url}",
            table(&header, 2, rows),
            bytes(registry.resident_bytes() as u64),
            bytes(registry.limit_bytes() as u64),
            registry.base().name(),
        )
    })
}

fn row(tenant: &Listing) -> Vec<String> {
    let name = tenant.desired.name.clone();
    let Some(facts) = &tenant.facts else {
        return vec![
            name,
            "cannot be read".to_owned(),
            String::new(),
            String::new(),
            String::new(),
            String::new(),
        ];
    };
    let memory = match (&tenant.failure, tenant.resident_bytes) {
        (Some(_), _) => "failed".to_owned(),
        (None, Some(n)) => bytes(n as u64),
        (None, None) => "on demand".to_owned(),
    };
    let skill = facts.skill_kept().map_or_else(String::new, |(_, kept)| percent(kept));
    vec![
        name,
        facts.codecs.join(", "),
        bytes(facts.sizes.total_bytes),
        format!("{:.2}", facts.sizes.effective_bpw_total()),
        skill,
        memory,
    ]
}

/// Ready when the process is asked to stop.
async fn stopped() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
        } else {
            let _ = interrupt.await;
        }
    }
    #[cfg(not(unix))]
    let _ = interrupt.await;
    Output::note("stopping: no new requests; those that are there are answered");
}
