//! What the user may type.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::NonEmptyStringValueParser;
use clap::{Parser, Subcommand};
use onebase_codec::CodecSpec;
use onebase_codec::rqt::Rqt;
use onebase_compress::{Budget, TablePlan, VectorPlan};
use onebase_format::artifact::Shard;

mod bench;
mod serve;

pub(crate) use bench::{Arrivals, BenchCommand, BenchServeArgs, Draw};
pub(crate) use serve::ServeArgs;

/// One base model, hundreds of fine-tunes.
///
/// OneBase stores each fine-tune as a small compressed delta of its base model and
/// answers for many of them from one copy of the base.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Args {
    /// Print one JSON object on standard output, everything else on standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Threads to use; 0 for one per core
    #[arg(long, global = true, default_value_t = 0, env = "ONEBASE_THREADS")]
    pub(crate) threads: usize,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress a fine-tune into a delta artifact
    Compress(CompressArgs),
    /// Write a base in 4 and 8 bits, on which deltas are served as on the base itself
    Quantize(QuantizeArgs),
    /// Measure what a model's linear sites read, for codecs that weigh errors by it
    Calibrate(CalibrateArgs),
    /// Join the shards of an artifact that `compress --shard` has made
    Finalize(FinalizeArgs),
    /// Change a family that `compress --codec rqt` has made
    #[command(subcommand)]
    Family(FamilyCommand),
    /// Show what an artifact, a family or an archive holds and what it costs
    Inspect(InspectArgs),
    /// Check an artifact, a family or an archive, and that a base is the one it was made against
    Verify(VerifyArgs),
    /// Rebuild the fine-tune's checkpoint from base and artifact
    Restore(RestoreArgs),
    /// Store a fine-tune's folder so that every file comes back to the byte
    Archive(ArchiveArgs),
    /// Measure how much of a fine-tune's skill an artifact keeps
    Eval(EvalArgs),
    /// Sweep codecs over sizes and report what each keeps, as a page of charts
    Compare(CompareArgs),
    /// Answer prompts with the base and any number of deltas, in one batch
    Generate(GenerateArgs),
    /// Serve the base and any number of tenants to clients of OpenAI's API
    Serve(ServeArgs),
    /// Measure what runs
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Compress the demo family with each codec, score it and ask it questions
    Demo(DemoArgs),
    /// List the codecs and their options
    Codecs,
    /// Print a shell's completion script
    Completions(CompletionsArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CompressArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Checkpoint folder of the fine-tune; with `--codec rqt` those of a family, each as FINETUNE
    /// or NAME=FINETUNE
    #[arg(value_name = "FINE_TUNE", required = true)]
    pub(crate) fine_tunes: Vec<OsString>,
    /// Folder of the artifact, or of the family, to write
    #[arg(short, long)]
    pub(crate) out: PathBuf,
    /// Codec of the linear sites, as NAME or NAME:OPTION=VALUE,… (see `onebase codecs`)
    #[arg(long, default_value = "rtn", value_parser = codec)]
    pub(crate) codec: GivenCodec,
    /// With a quantized base: the model that it was quantized from. The deltas are those of the
    /// fine-tune alone then; without it they make good, too, what quantizing has changed
    #[arg(long, value_name = "BASE")]
    pub(crate) full_base: Option<PathBuf>,
    /// How embeddings and head are stored: `exact`, or a codec; the same codec unless given
    #[arg(long, value_parser = tables)]
    pub(crate) embeddings: Option<TablePlan>,
    /// How norms and biases are stored: `exact`, or a codec
    #[arg(long, default_value = "exact", value_parser = vectors)]
    pub(crate) vectors: VectorPlan,
    /// With `--codec rqt`: the codec of what each fine-tune has of its own at linear sites, instead
    /// of codes that are planned with the tree
    #[arg(long, value_name = "CODEC", value_parser = plain_codec)]
    pub(crate) leaf: Option<CodecSpec>,
    /// With `--codec rqt`: print how alike the fine-tunes are and what sharing can gain, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Choose the codec's size so that the artifact is no larger, or the family's tenants on
    /// average: 2.1bpw (effective bits per
    /// weight of the linear sites), 10% (of the fine-tune's bytes) or 200MB
    #[arg(long, value_name = "SIZE")]
    pub(crate) budget: Option<Budget>,
    /// Give each linear site a size of its own within the budget, by its error over its weights;
    /// each is encoded at several sizes for that
    #[arg(long, requires = "budget")]
    pub(crate) allocate: bool,
    /// Do only part I of N, in a process or on a machine of its own; `onebase finalize` joins them
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub(crate) shard: Option<Shard>,
    /// Throw away what an interrupted run has done, instead of going on with it
    #[arg(long)]
    pub(crate) restart: bool,
    /// Statistics of the base or the fine-tune, from `onebase calibrate`: errors of linear sites
    /// are weighed by their inputs
    #[arg(long, value_name = "STATS")]
    pub(crate) statistics: Option<PathBuf>,
    /// A plain text: inputs are measured on it while compressing, of each linear site through
    /// those that are compressed already; never one that the fine-tune is judged by
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["statistics", "shard", "allocate"])]
    pub(crate) calibration: Option<PathBuf>,
    /// Tokens of that text to use, the first ones
    #[arg(long, value_name = "N", default_value = "16384", value_parser = positive,
        requires = "calibration")]
    pub(crate) calibration_tokens: usize,
    /// Tokens that are run as one document
    #[arg(long, value_name = "TOKENS", default_value_t = onebase_compress::WINDOW_TOKENS,
        value_parser = positive, requires = "calibration")]
    pub(crate) calibration_window: usize,
    /// Keep the fine-tune to the byte too, as an archive in the artifact's folder `original`;
    /// `onebase restore --exact` reads it. It is no part of the artifact's size
    #[arg(long, conflicts_with = "shard")]
    pub(crate) keep_original: bool,
    /// A plain text: a factor for each linear site is fitted so that the logits on it are the
    /// fine-tune's (BitDelta's scale distillation). A run that is killed begins anew then
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["budget", "shard"])]
    pub(crate) distill: Option<PathBuf>,
    /// Tokens of that text to use, the first ones; a quarter of them judges the fit
    #[arg(long, value_name = "N", default_value = "4096", value_parser = positive,
        requires = "distill")]
    pub(crate) distill_tokens: usize,
}

/// Where tokens are from: one of three.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct TokensArgs {
    /// A plain text; never one that the model is judged by
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// N tokens that the model itself writes, at temperature 1
    #[arg(long, value_name = "N", value_parser = tokens)]
    pub(crate) generate: Option<usize>,
    /// N tokens of the vocabulary, each as likely as any other
    #[arg(long, value_name = "N", value_parser = tokens)]
    pub(crate) random: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CalibrateArgs {
    /// Checkpoint folder of the model, a base or a fine-tune
    pub(crate) model: PathBuf,
    /// Folder of the statistics to write
    #[arg(short, long, value_name = "STATS")]
    pub(crate) out: PathBuf,
    #[command(flatten)]
    pub(crate) source: TokensArgs,
    /// Tokens of the text to use, the first ones
    #[arg(long, value_name = "N", default_value = "131072", value_parser = positive,
        conflicts_with_all = ["generate", "random"])]
    pub(crate) tokens: usize,
    /// Tokens that are run as one document
    #[arg(long, value_name = "TOKENS", default_value_t = onebase_compress::WINDOW_TOKENS,
        value_parser = positive)]
    pub(crate) window: usize,
    /// Seed of the draws
    #[arg(long, default_value_t = 0, conflicts_with = "text")]
    pub(crate) seed: u64,
}

/// Bits of a part of a model that need not be quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Bits {
    /// As they are
    #[value(name = "16")]
    Sixteen,
    /// In 8 bits
    #[value(name = "8")]
    Eight,
    /// In 4 bits
    #[value(name = "4")]
    Four,
}

impl Bits {
    pub(crate) fn count(self) -> u32 {
        match self {
            Bits::Sixteen => 16,
            Bits::Eight => 8,
            Bits::Four => 4,
        }
    }
}

/// The basis in which a base is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum QuantizeMethod {
    /// Principal components of activations, an eighth of them in 8 bits
    Resq,
    /// Random Hadamard rotations, all in one width
    Quarot,
    /// The model's own basis
    Rtn,
}

/// How weights are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum QuantizeRounding {
    /// Each to the nearest
    Rtn,
    /// Column by column, errors made good by those that follow; reads the text
    Gptq,
}

#[derive(Debug, clap::Args)]
pub(crate) struct QuantizeArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Folder of the quantized base to write
    #[arg(short, long, value_name = "QBASE")]
    pub(crate) out: PathBuf,
    /// In which basis
    #[arg(long, value_enum, default_value = "resq")]
    pub(crate) method: QuantizeMethod,
    /// Bits of the weights of linear sites, 4 or 8; with resq and 4, an eighth has 8
    #[arg(long, value_enum, default_value = "4")]
    pub(crate) weights: Bits,
    /// Bits of what linear sites read; with resq and 4, an eighth has 8
    #[arg(long, value_enum, default_value = "8")]
    pub(crate) activations: Bits,
    /// Bits of keys and values; with resq and 4, an eighth has 8
    #[arg(long, value_enum, default_value = "4")]
    pub(crate) kv: Bits,
    /// Bits of embedding and head, 16 or 8
    #[arg(long, value_enum, default_value = "8")]
    pub(crate) embeddings: Bits,
    /// A plain text that rotations and rounding follow; never one that models are judged by
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// In place of a text, N tokens of the vocabulary, each as likely as any other: for models
    /// without a tokenizer
    #[arg(long, value_name = "N", value_parser = tokens, conflicts_with = "text")]
    pub(crate) random: Option<usize>,
    /// Tokens of the text to use, the first ones
    #[arg(long, value_name = "N", default_value = "32768", value_parser = positive,
        requires = "text")]
    pub(crate) tokens: usize,
    /// Tokens that are run as one document
    #[arg(long, value_name = "TOKENS", default_value_t = onebase_compress::WINDOW_TOKENS,
        value_parser = positive)]
    pub(crate) window: usize,
    /// How weights are rounded; gptq where there are tokens, unless given
    #[arg(long, value_enum)]
    pub(crate) rounding: Option<QuantizeRounding>,
    /// As the method's authors have it: inputs of output projections in groups of a head, keys
    /// and queries in 8 bits before they are rotated. Slower
    #[arg(long)]
    pub(crate) paper: bool,
    /// Seed of the random rotations
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FinalizeArgs {
    /// Folder of the artifact, as given to `onebase compress --shard`
    pub(crate) artifact: PathBuf,
}

/// A codec of linear sites.
#[derive(Clone, Debug)]
pub(crate) enum GivenCodec {
    /// Of one fine-tune, and whether its size was said with it, and what shares a scale.
    Delta { spec: CodecSpec, has_size: bool, has_scale: bool },
    /// Of a family.
    Family(Rqt),
}

/// What is done with a family.
#[derive(Debug, Subcommand)]
pub(crate) enum FamilyCommand {
    /// Add a fine-tune, without touching the tenants that are there
    Add(FamilyAddArgs),
    /// Remove a tenant, and the nodes that no other has
    Remove(FamilyRemoveArgs),
    /// Build the tree anew from the fine-tunes of all tenants
    Rebuild(FamilyRebuildArgs),
}

/// How what is in no node is stored.
#[derive(Debug, clap::Args)]
pub(crate) struct RestArgs {
    /// How embeddings and head are stored: `exact`, or a codec
    #[arg(long, default_value = FAMILY_TABLES, value_parser = tables)]
    pub(crate) embeddings: TablePlan,
    /// How norms and biases are stored: `exact`, or a codec
    #[arg(long, default_value = "exact", value_parser = vectors)]
    pub(crate) vectors: VectorPlan,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FamilyAddArgs {
    /// Folder of the family
    pub(crate) family: PathBuf,
    /// Checkpoint folder of the fine-tune, as FINETUNE or NAME=FINETUNE
    #[arg(value_name = "FINE_TUNE")]
    pub(crate) fine_tune: OsString,
    /// Checkpoint folder of the base model
    #[arg(long)]
    pub(crate) base: PathBuf,
    /// The codec of what it has of its own at linear sites [default: the fewest bits with which it
    /// is expected to be as good as the other tenants]
    #[arg(long, value_name = "CODEC", value_parser = plain_codec)]
    pub(crate) leaf: Option<CodecSpec>,
    #[command(flatten)]
    pub(crate) rest: RestArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FamilyRemoveArgs {
    /// Folder of the family
    pub(crate) family: PathBuf,
    /// The tenant
    pub(crate) tenant: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct FamilyRebuildArgs {
    /// Folder of the family
    pub(crate) family: PathBuf,
    /// Checkpoint folders of all tenants' fine-tunes, each as FINETUNE or NAME=FINETUNE
    #[arg(value_name = "FINE_TUNE", required = true)]
    pub(crate) fine_tunes: Vec<OsString>,
    /// Checkpoint folder of the base model
    #[arg(long)]
    pub(crate) base: PathBuf,
    /// `rqt` with its options
    #[arg(long, default_value = "rqt", value_parser = family_codec)]
    pub(crate) codec: Rqt,
    /// The codec of what each fine-tune has of its own at linear sites, instead of codes that are
    /// planned with the tree
    #[arg(long, value_name = "CODEC", value_parser = plain_codec)]
    pub(crate) leaf: Option<CodecSpec>,
    /// How large the family may be, see `onebase compress --budget`
    #[arg(long, value_name = "SIZE")]
    pub(crate) budget: Budget,
    #[command(flatten)]
    pub(crate) rest: RestArgs,
}

/// How the token tables of a family's tenants are stored unless that is said.
pub(crate) const FAMILY_TABLES: &str = "rtn:bits=4";

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// Folder of the artifact or the family
    pub(crate) artifact: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub(crate) tensors: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VerifyArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Folder of the artifact or the family
    pub(crate) artifact: PathBuf,
    /// BASE is what this archive makes of it; several are restored in turn, as long as it takes
    #[arg(long, value_name = "ARCHIVE")]
    pub(crate) through: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Folder of the artifact; with `--exact` of an archive, or of an artifact that keeps its original
    pub(crate) artifact: PathBuf,
    /// Checkpoint folder to write
    #[arg(short, long)]
    pub(crate) out: PathBuf,
    /// Write every file as it was, from what `onebase archive` has made
    #[arg(long)]
    pub(crate) exact: bool,
    /// BASE is what this archive makes of it; several are restored in turn, as long as it takes
    #[arg(long, value_name = "ARCHIVE", requires = "exact")]
    pub(crate) through: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ArchiveArgs {
    /// Folder of the base model, or of any checkpoint that the fine-tune was made from
    pub(crate) base: PathBuf,
    /// Folder of the fine-tune
    pub(crate) fine_tune: PathBuf,
    /// Folder of the archive to write
    #[arg(short, long)]
    pub(crate) out: PathBuf,
    /// BASE is what this archive makes of it; several are restored in turn, as long as it takes
    #[arg(long, value_name = "ARCHIVE")]
    pub(crate) through: Vec<PathBuf>,
}

/// What is measured with.
#[derive(Debug, clap::Args)]
pub(crate) struct MeasureArgs {
    /// Files of questions, JSON lines with `messages` or `prompt`, and `answer`; one or more
    #[arg(long, num_args = 1.., value_name = "FILE.jsonl")]
    pub(crate) tasks: Vec<PathBuf>,
    /// Only the first N questions of each task
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) limit: Option<usize>,
    /// A plain text for perplexity
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Tokens of that text that are run as one document [default: the context, at most 2048]
    #[arg(long, value_name = "TOKENS", value_parser = window, requires = "text")]
    pub(crate) window: Option<usize>,
    /// A plain text for activations: errors are then weighed by them too
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: Option<PathBuf>,
    /// Seed of the intervals' resampling
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, clap::Args)]
pub(crate) struct EvalArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Folder of the artifact; without one, base and fine-tune are measured alone
    pub(crate) artifact: Option<PathBuf>,
    /// Checkpoint folder of the fine-tune that the artifact was made from
    #[arg(long, value_name = "FINETUNE")]
    pub(crate) reference: PathBuf,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
    /// Write the results into the artifact and its model card
    #[arg(long, requires = "artifact")]
    pub(crate) record: bool,
    /// List the error at every linear site
    #[arg(long, requires = "artifact")]
    pub(crate) sites: bool,
    /// Write every question with all replies into this file, as JSON lines
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) samples: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CompareArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// Checkpoint folder of the fine-tune
    pub(crate) fine_tune: PathBuf,
    /// Codecs to compare beside the baselines, NAME or NAME:OPTION=VALUE,…; all unless given;
    /// one or more
    #[arg(long, num_args = 1.., value_name = "CODEC")]
    pub(crate) codecs: Vec<String>,
    /// Sizes for codecs that can choose, in bits per weight
    #[arg(long, num_args = 1.., value_delimiter = ',', value_name = "BITS", value_parser = bits,
        default_values_t = [0.25, 0.5, 1.0, 2.0, 3.0])]
    pub(crate) bits: Vec<f64>,
    /// How embeddings and head are stored: `exact`, or a codec; each one's own unless given
    #[arg(long, value_parser = tables)]
    pub(crate) embeddings: Option<TablePlan>,
    /// Statistics of the base or the fine-tune, from `onebase calibrate`, for the codecs that can
    /// use them
    #[arg(long, value_name = "STATS")]
    pub(crate) statistics: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,
    /// The report, an HTML file; its data goes beside it with the ending `.json`
    #[arg(short, long, default_value = "report.html", value_name = "FILE.html")]
    pub(crate) out: PathBuf,
    /// Do not run a simulated code on the limit line, which writes a checkpoint for each size
    #[arg(long)]
    pub(crate) no_ideal: bool,
    /// Keep the artifacts in this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct GenerateArgs {
    /// Checkpoint folder of the base model
    pub(crate) base: PathBuf,
    /// A fine-tune to answer: NAME=ARTIFACT; may be given many times
    #[arg(short, long = "delta", value_name = "NAME=ARTIFACT")]
    pub(crate) deltas: Vec<NamedDelta>,
    /// All tenants of a family answer
    #[arg(long)]
    pub(crate) family: Option<PathBuf>,
    /// A prompt; may be given many times, each is answered by every model
    #[arg(short, long = "prompt", required = true, value_name = "TEXT")]
    pub(crate) prompts: Vec<String>,
    /// Let the base answer too (without a delta it always does)
    #[arg(long)]
    pub(crate) with_base: bool,
    /// A system message before each prompt
    #[arg(long, conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// Divides the logits; 0 takes the most likely token always
    #[arg(short, long, default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f32,
    /// Only the K most likely tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub(crate) top_k: usize,
    /// Only the most likely tokens whose probabilities reach P
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = probability)]
    pub(crate) top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// A text that ends the answer; may be given many times
    #[arg(long = "stop", value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) stop: Vec<String>,
    /// Sequences that are run together
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) batch_size: u16,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DemoArgs {
    /// The demo family's folder
    #[arg(long, default_value = "demo")]
    pub(crate) dir: PathBuf,
    /// Keep the artifacts in this folder
    #[arg(short, long)]
    pub(crate) out: Option<PathBuf>,
    /// Questions of each test
    #[arg(long, default_value = "200", value_parser = positive)]
    pub(crate) questions: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// A delta and the name of the tenant it is for.
#[derive(Clone, Debug)]
pub(crate) struct NamedDelta {
    pub(crate) name: String,
    pub(crate) artifact: PathBuf,
}

impl FromStr for NamedDelta {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, artifact)) if !name.is_empty() && !artifact.is_empty() => {
                Ok(Self { name: name.to_owned(), artifact: artifact.into() })
            }
            _ => Err("expected NAME=ARTIFACT".to_owned()),
        }
    }
}

/// A codec's complaint with its hint, for clap to print.
fn with_hint(error: &onebase_codec::Error) -> String {
    match error.hint() {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

fn codec(text: &str) -> Result<GivenCodec, String> {
    if Rqt::is_named(text) {
        return family_codec(text).map(GivenCodec::Family);
    }
    let spec = plain_codec(text)?;
    let says = |option: &str| text.split([':', ',']).any(|pair| pair.starts_with(option));
    Ok(GivenCodec::Delta { spec, has_size: CodecSpec::says_size(text), has_scale: says("scale=") })
}

fn plain_codec(text: &str) -> Result<CodecSpec, String> {
    text.parse().map_err(|e| with_hint(&e))
}

fn family_codec(text: &str) -> Result<Rqt, String> {
    text.parse().map_err(|e| with_hint(&e))
}

fn shard(text: &str) -> Result<Shard, String> {
    let parsed = text.split_once('/').and_then(|(index, count)| {
        let shard = Shard { index: index.parse().ok()?, count: count.parse().ok()? };
        (1..=shard.count).contains(&shard.index).then_some(shard)
    });
    parsed.ok_or_else(|| "expected I/N with I from 1 to N, such as 2/8".to_owned())
}

fn tables(text: &str) -> Result<TablePlan, String> {
    text.parse().map_err(|e| with_hint(&e))
}

fn vectors(text: &str) -> Result<VectorPlan, String> {
    text.parse().map_err(|e| with_hint(&e))
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number from 1 on".to_owned()),
        Ok(n) => Ok(n),
    }
}

/// Tokens to draw: the stream of more than a few millions fits no machine.
fn tokens(text: &str) -> Result<usize, String> {
    const MOST: usize = 1 << 24;
    match text.parse() {
        Ok(n) if (1..=MOST).contains(&n) => Ok(n),
        _ => Err(format!("expected a number from 1 to {MOST}")),
    }
}

fn window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0 | 1) | Err(_) => Err("expected a number from 2 on".to_owned()),
        Ok(n) => Ok(n),
    }
}

fn bits(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
    if value > 0.0 && value <= 32.0 {
        Ok(value)
    } else {
        Err("expected a number above 0, at most 32".to_owned())
    }
}

fn temperature(text: &str) -> Result<f32, String> {
    let value = text.parse().map_err(|_| "expected a number".to_owned())?;
    if (0.0..=100.0).contains(&value) { Ok(value) } else { Err("expected 0 to 100".to_owned()) }
}

fn probability(text: &str) -> Result<f32, String> {
    let value = text.parse().map_err(|_| "expected a number".to_owned())?;
    if value > 0.0 && value <= 1.0 {
        Ok(value)
    } else {
        Err("expected a number above 0, at most 1".to_owned())
    }
}
