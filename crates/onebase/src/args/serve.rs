use std::net::IpAddr;
use std::path::PathBuf;

use super::{NamedDelta, positive};

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Folder of artifacts and families: each artifact is a tenant under its folder's name
    #[arg(long, value_name = "DIR")]
    pub(crate) deltas: Option<PathBuf>,
    /// A tenant: NAME=ARTIFACT; may be given many times
    #[arg(short, long = "delta", value_name = "NAME=ARTIFACT")]
    pub(crate) named: Vec<NamedDelta>,
    /// All tenants of a family
    #[arg(long)]
    pub(crate) family: Option<PathBuf>,
    /// The name under which the base answers [default: its folder's]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 for a free one
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Most requests that are answered at once
    #[arg(long, default_value = "16", value_parser = positive)]
    pub(crate) max_batch: usize,
    /// Most tokens that a step runs: fewer let answers flow while long prompts are read
    #[arg(long, default_value = "256", value_parser = positive)]
    pub(crate) step_tokens: usize,
    /// Most memory of keys and values, such as 500MB or 4GiB
    #[arg(long, default_value = "1GiB", value_name = "SIZE", value_parser = byte_size)]
    pub(crate) kv_bytes: usize,
    /// Most memory of tenants' weights; those that are used least make room and are read again
    #[arg(long, default_value = "8GiB", value_name = "SIZE", value_parser = byte_size)]
    pub(crate) delta_bytes: usize,
    /// Most requests that wait; more are told to come again
    #[arg(long, default_value = "256", value_parser = positive)]
    pub(crate) queue: usize,
    /// Most tokens of an answer
    #[arg(long, default_value = "4096", value_parser = positive)]
    pub(crate) max_tokens: usize,
    /// Seconds that a request may take, waiting included
    #[arg(long, default_value = "600", value_parser = positive)]
    pub(crate) request_seconds: usize,
    /// File of API keys (see docs/serving.md); without it everybody who reaches the port may ask
    #[arg(long, value_name = "FILE")]
    pub(crate) api_keys: Option<PathBuf>,
    /// The key with which tenants can be changed
    #[arg(long, env = "ONEBASE_ADMIN_KEY", hide_env_values = true, value_name = "KEY")]
    pub(crate) admin_key: Option<String>,
    /// Folder that keeps which tenants are served, so that loads and unloads outlive the server
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Where spans of requests are sent, by OTLP over HTTP, such as
    /// http://localhost:4318/v1/traces
    #[arg(long, env = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", value_name = "URL")]
    pub(crate) otlp_traces_endpoint: Option<String>,
}

/// A number of bytes, with a unit of thousands or of 1024.
fn byte_size(text: &str) -> Result<usize, String> {
    let bad = || format!("expected a size such as 500MB or 4GiB, got {text:?}");
    let digits = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: f64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024f64.powi(2),
        "gib" => 1024f64.powi(3),
        "tib" => 1024f64.powi(4),
        _ => return Err(bad()),
    };
    let bytes = number.trim().parse::<f64>().map_err(|_| bad())? * unit;
    if !(1.0..1e18).contains(&bytes) {
        return Err(bad());
    }
    // Within the range just checked.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::byte_size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(byte_size("4GiB"), Ok(4 << 30));
        assert_eq!(byte_size("1.5kb"), Ok(1500));
        assert_eq!(byte_size("123"), Ok(123));
        for bad in ["", "GB", "-1GB", "0", "1XB", "nan", "1e30"] {
            assert!(byte_size(bad).is_err(), "{bad}");
        }
    }
}
