use std::path::PathBuf;
use std::str::FromStr;

use super::positive;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum BenchCommand {
    /// Load a running server with requests and report what it keeps up with
    Serve(BenchServeArgs),
}

/// Whom requests are for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Draw {
    /// All alike.
    Uniform,
    /// The k-th with a probability that falls as k to this power.
    Zipf(f64),
}

/// When requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Arrivals {
    /// Independently of each other.
    Poisson,
    /// In bursts, or evenly: gaps have this coefficient of variation, 1 for Poisson.
    Gamma(f64),
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchServeArgs {
    /// Where the server is, such as http://127.0.0.1:8000
    pub(crate) url: String,
    /// A model to ask; may be given many times, the most popular first [default: all tenants]
    #[arg(short, long = "model", value_name = "NAME")]
    pub(crate) models: Vec<String>,
    /// Requests to send
    #[arg(short = 'n', long, default_value = "64", value_parser = positive)]
    pub(crate) requests: usize,
    /// Requests per second; without it, the next comes when one is answered
    #[arg(long, value_parser = positive_number)]
    pub(crate) rate: Option<f64>,
    /// Most requests at once
    #[arg(short, long, default_value = "16", value_parser = positive)]
    pub(crate) concurrency: usize,
    /// When they come: `poisson`, or `gamma:CV` with the gaps' coefficient of variation
    #[arg(long, default_value = "poisson", requires = "rate")]
    pub(crate) arrivals: Arrivals,
    /// Whom they are for: `uniform` or `zipf:S`
    #[arg(long, default_value = "uniform")]
    pub(crate) draw: Draw,
    /// Whom and when, from a file with lines of SECONDS MODEL [PROMPT_TOKENS ANSWER_TOKENS]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rate", "draw", "requests", "models"])]
    pub(crate) trace: Option<PathBuf>,
    /// Tokens of a prompt
    #[arg(long, default_value = "64", value_parser = positive)]
    pub(crate) prompt_tokens: usize,
    /// Tokens of an answer
    #[arg(long, default_value = "32", value_parser = positive)]
    pub(crate) answer_tokens: usize,
    /// Seconds to the first token within which an answer counts as good
    #[arg(long, default_value = "1", value_parser = positive_number)]
    pub(crate) first_token_bound: f64,
    /// The key to ask with
    #[arg(long, env = "ONEBASE_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Seed of all draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

fn positive_number(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 => Ok(n),
        _ => Err("expected a number above 0".to_owned()),
    }
}

impl FromStr for Draw {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "uniform" => Ok(Draw::Uniform),
            Some(("zipf", power)) => positive_number(power).map(Draw::Zipf),
            _ => Err("expected uniform or zipf:S".to_owned()),
        }
    }
}

impl FromStr for Arrivals {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "poisson" => Ok(Arrivals::Poisson),
            Some(("gamma", variation)) => positive_number(variation).map(Arrivals::Gamma),
            _ => Err("expected poisson or gamma:CV".to_owned()),
        }
    }
}
