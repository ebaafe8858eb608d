use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use onebase_codec::CodecSpec;
use onebase_codec::rqt::{Rqt, Tree};
use onebase_compress::{
    Budget, FamilyOptions, FamilyPlans, FamilyReport, Member, NodeReport, Relatives, add_to_family,
    build_family, check_originals, family_report, open_members, rebuild_family, verify_family,
};
use onebase_format::family::{Family, Similarity};
use onebase_format::{Checkpoint, Digest};
use serde_json::{Value, json};

use crate::args::{
    CompressArgs, FAMILY_TABLES, FamilyAddArgs, FamilyCommand, FamilyRebuildArgs, FamilyRemoveArgs,
};
use crate::commands::compress::peak_memory_bytes;
use crate::output::{Bar, Output, bytes, number, table};

pub(crate) fn run(command: &FamilyCommand, output: &Output) -> anyhow::Result<()> {
    match command {
        FamilyCommand::Add(args) => add(args, output),
        FamilyCommand::Remove(args) => remove(args, output),
        FamilyCommand::Rebuild(args) => rebuild(args, output),
    }
}

/// Compresses a family: what it has in common is printed first.
pub(crate) fn compress(args: &CompressArgs, rqt: &Rqt, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    let Some(budget) = args.budget else {
        bail!("`--codec rqt` plans bits for a budget; give one, for example --budget 2bpw")
    };
    let other = [
        ("--allocate", args.allocate),
        ("--shard", args.shard.is_some()),
        ("--statistics", args.statistics.is_some()),
        ("--calibration", args.calibration.is_some()),
        ("--distill", args.distill.is_some()),
        ("--keep-original", args.keep_original),
    ];
    if let Some((option, _)) = other.iter().find(|(_, given)| *given) {
        bail!("{option} is for one fine-tune, not for a family");
    }
    if args.out.symlink_metadata().is_ok() {
        return Err(onebase_format::Error::Exists { path: args.out.clone() }.into());
    }
    let tables = match &args.embeddings {
        Some(tables) => tables.clone(),
        None => FAMILY_TABLES.parse()?,
    };
    let options = FamilyOptions {
        rqt: rqt.clone(),
        leaf: args.leaf.clone(),
        tables,
        vectors: args.vectors.clone(),
    };
    let members = open_members(&args.base, &named(&args.fine_tunes)?)?;
    let planned = plan(&members, &options, budget)?;
    if args.dry_run {
        return output.result(&planned.to_json(), || planned.to_text());
    }
    Output::note(planned.to_text().trim_end());
    let bar = Bar::new("compressing");
    build_family(&members, &planned.relatives, &planned.plans.shared, &args.out, &bar)?;
    bar.finish();
    say_family(&args.out, &members, start, Some(&planned), output)
}

/// What is known of a family before it is written.
struct Planned {
    relatives: Relatives,
    similarity: Similarity,
    plans: FamilyPlans,
}

fn plan(members: &[Member], options: &FamilyOptions, budget: Budget) -> anyhow::Result<Planned> {
    let bar = Bar::new("comparing");
    let relatives = Relatives::measure(members, &bar)?;
    bar.finish();
    let plans = FamilyPlans::within(members, &relatives, options, budget)?;
    let similarity = relatives.similarity();
    Ok(Planned { relatives, similarity, plans })
}

/// How much less an error is than another, in decibels.
fn decibels(from: f64, to: f64) -> f64 {
    if from > 0.0 && to > 0.0 { 10.0 * (from / to).log10() } else { 0.0 }
}

impl Planned {
    /// The names of the fine-tunes of each group that shares codes.
    fn groups(&self) -> Vec<Vec<&str>> {
        let named = |group: &Vec<usize>| {
            group.iter().map(|m| self.similarity.tenants[*m].as_str()).collect()
        };
        self.plans.shared.groups.iter().map(named).collect()
    }

    fn to_json(&self) -> Value {
        let tenants = self.similarity.tenants.iter().enumerate().map(|(i, name)| {
            json!({
                "name": name,
                "expected_error_alone": self.plans.alone.expected_errors[i],
                "expected_error": self.plans.shared.expected_errors[i],
            })
        });
        json!({
            "similarity": self.similarity,
            "groups": self.groups(),
            "tenants": tenants.collect::<Vec<_>>(),
        })
    }

    fn to_text(&self) -> String {
        let names = &self.similarity.tenants;
        let numbers: Vec<String> = (1..=names.len()).map(|n| n.to_string()).collect();
        let mut header = vec!["cosine of deltas"];
        header.extend(numbers.iter().map(String::as_str));
        let rows =
            names.iter().zip(&self.similarity.cosines).enumerate().map(|(i, (name, row))| {
                // It is symmetric.
                let cells = row.iter().enumerate().map(|(j, cosine)| match j.cmp(&i) {
                    Ordering::Less => format!("{cosine:.3}"),
                    Ordering::Equal => "1".to_owned(),
                    Ordering::Greater => String::new(),
                });
                std::iter::once(format!("{} {name}", i + 1)).chain(cells).collect()
            });
        let mut text = table(&header, 1, rows.collect()).to_string();
        if names.len() > 1 {
            let _ = writeln!(text, "\nalike, and how much of them is in common:");
            text.push_str(&dendrogram(self.relatives.tree(), names));
        }
        let rows = names.iter().enumerate().map(|(i, name)| {
            let (alone, shared) =
                (self.plans.alone.expected_errors[i], self.plans.shared.expected_errors[i]);
            let gain = format!("{:.2} dB", decibels(alone, shared));
            vec![name.clone(), number(alone), number(shared), gain]
        });
        let header = ["expected error of deltas", "alone", "shared", "gain"];
        let _ = writeln!(text, "\n{}", table(&header, 1, rows.collect()));
        let shared = self.groups();
        if shared.is_empty() {
            text.push_str("nobody shares codes: the fine-tunes have too little in common\n");
        }
        for group in shared {
            let _ = writeln!(text, "{} share codes", some_of(&group));
        }
        text
    }
}

/// The tree of fine-tunes, alike first, as lines of text.
fn dendrogram(tree: &Tree, names: &[String]) -> String {
    fn draw(tree: &Tree, names: &[String], v: usize, indent: &str, text: &mut String) {
        let node = &tree.nodes()[v];
        let Some(children) = node.children else {
            let _ = writeln!(text, " {}", names[node.members[0]]);
            return;
        };
        #[allow(clippy::cast_precision_loss)]
        let common = 1.0 - node.height / node.members.len() as f64;
        let _ = writeln!(text, "┬ {:.0} %", 100.0 * common);
        for (child, last) in children.into_iter().zip([false, true]) {
            let (mark, below) = if last { ("└─", "  ") } else { ("├─", "│ ") };
            let _ = write!(text, "{indent}{mark}");
            draw(tree, names, child, &format!("{indent}{below}"), text);
        }
    }
    let mut text = String::new();
    draw(tree, names, tree.root(), "", &mut text);
    text
}

/// Fine-tunes with the names of their tenants: as given, or those of the folders.
fn named(given: &[impl AsRef<OsStr>]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    given
        .iter()
        .map(|given| {
            let path = Path::new(given.as_ref());
            let text = given.as_ref().to_str();
            if let Some((name, rest)) = text.and_then(|text| text.split_once('='))
                && !path.exists()
                && !name.is_empty()
                && !name.contains(['/', '\\'])
                && !name.starts_with('.')
            {
                return Ok((name.to_owned(), PathBuf::from(rest)));
            }
            let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            let name = whole.file_name().and_then(OsStr::to_str).filter(|n| !n.starts_with('.'));
            let name = name.with_context(|| {
                format!("{} gives no name for a tenant; say NAME=FINETUNE", path.display())
            })?;
            Ok((name.to_owned(), path.to_owned()))
        })
        .collect()
}

fn add(args: &FamilyAddArgs, output: &Output) -> anyhow::Result<()> {
    let family = Family::open(&args.family)?;
    let members = open_members(&args.base, &named(std::slice::from_ref(&args.fine_tune))?)?;
    let Some(member) = members.first() else { bail!("no fine-tune was given") };
    let bar = Bar::new("adding");
    let FamilyAddArgs { leaf, rest, .. } = args;
    let (tables, vectors) = (&rest.embeddings, &rest.vectors);
    let added = add_to_family(&family, member, leaf.clone(), tables, vectors, &bar)?;
    bar.finish();
    let report = family_report(&family, None)?;
    let tenant = report.tenants.iter().find(|tenant| tenant.name == added.name);
    let object = json!({ "added": added, "sizes": tenant });
    output.result(&object, || {
        let mut rows = vec![
            ["nodes of others on its path".to_owned(), added.nodes.len().to_string()],
            ["of its delta they hold".to_owned(), format!("{:.1} %", 100.0 * (1.0 - added.left))],
            ["codes of its own".to_owned(), added.leaf.as_deref().map_or("none".to_owned(), short)],
            ["relative squared error".to_owned(), number(added.error)],
        ];
        if let Some(tenant) = tenant {
            rows.push([
                "effective bits per weight".to_owned(),
                format!(
                    "{:.3} of its own, {:.3} on its path",
                    tenant.marginal_bpw, tenant.path_bpw
                ),
            ]);
        }
        table(&["added", &added.name], 2, rows.into_iter().map(Vec::from).collect()).to_string()
    })
}

fn short(codec: &str) -> String {
    codec.parse::<CodecSpec>().map_or_else(|_| codec.to_owned(), |codec| codec.short())
}

fn remove(args: &FamilyRemoveArgs, output: &Output) -> anyhow::Result<()> {
    let family = Family::open(&args.family)?;
    let removed = family.change()?.remove_tenant(&args.tenant)?;
    let nodes: Vec<String> = removed.iter().map(ToString::to_string).collect();
    output.result(&json!({ "removed": args.tenant, "nodes": nodes }), || {
        format!("{} is removed, and {} nodes that nobody else had", args.tenant, nodes.len())
    })
}

fn rebuild(args: &FamilyRebuildArgs, output: &Output) -> anyhow::Result<()> {
    let start = Instant::now();
    let family = Family::open(&args.family)?;
    let members = open_members(&args.base, &named(&args.fine_tunes)?)?;
    check_originals(&family, &members)?;
    let options = FamilyOptions {
        rqt: args.codec.clone(),
        leaf: args.leaf.clone(),
        tables: args.rest.embeddings.clone(),
        vectors: args.rest.vectors.clone(),
    };
    let planned = plan(&members, &options, args.budget)?;
    Output::note(planned.to_text().trim_end());
    let bar = Bar::new("compressing");
    rebuild_family(&family, &members, &planned.relatives, &planned.plans.shared, &bar)?;
    bar.finish();
    say_family(&args.family, &members, start, Some(&planned), output)
}

fn say_family(
    dir: &Path,
    members: &[Member],
    start: Instant,
    planned: Option<&Planned>,
    output: &Output,
) -> anyhow::Result<()> {
    let family = Family::open(dir)?;
    let base = members.first().map(|member| bits_of(member.pair.base()));
    let report = family_report(&family, base)?;
    let object = json!({
        "family": dir,
        "report": report,
        "planned": planned.map(Planned::to_json),
        "seconds": start.elapsed().as_secs_f64(),
        "peak_memory_bytes": peak_memory_bytes(),
    });
    output.result(&object, || {
        let mut text = family_text(&family, &report);
        let seconds = start.elapsed().as_secs_f64();
        let peak = peak_memory_bytes().map(|peak| format!(", peak memory {}", bytes(peak)));
        let _ = writeln!(text, "\n{seconds:.1} s{}", peak.unwrap_or_default());
        text
    })
}

/// Bits per weight of a checkpoint.
#[allow(clippy::cast_precision_loss)]
fn bits_of(checkpoint: &Checkpoint) -> f64 {
    8.0 * checkpoint.size_bytes() as f64 / checkpoint.n_weights().max(1) as f64
}

/// Prints a family's tree and what it takes.
pub(crate) fn inspect(dir: &Path, output: &Output) -> anyhow::Result<()> {
    let family = Family::open(dir)?;
    let report = family_report(&family, None)?;
    let object = json!({ "family": dir, "manifest": family.manifest(), "report": report });
    output.result(&object, || family_text(&family, &report))
}

/// Checks every tenant of a family.
pub(crate) fn verify(base: &Checkpoint, dir: &Path, output: &Output) -> anyhow::Result<()> {
    let family = Family::open(dir)?;
    let bar = Bar::new("verifying");
    let verified = verify_family(base, &family, &bar)?;
    bar.finish();
    let checked: BTreeMap<_, _> = verified.iter().map(|(name, v)| (name, v)).collect();
    let object = json!({ "verified": true, "family": dir, "checked": checked });
    output.result(&object, || {
        let n_deltas: usize = verified.iter().map(|(_, v)| v.n_deltas).sum();
        let names: Vec<&str> = verified.iter().map(|(name, _)| name.as_str()).collect();
        format!(
            "{} is whole and belongs to its base: {} deltas checked of {}",
            dir.display(),
            n_deltas,
            names.join(", ")
        )
    })
}

fn family_text(family: &Family, report: &FamilyReport) -> String {
    let manifest = family.manifest();
    let codec = CodecText(&manifest.codec.name, &manifest.codec.options).to_string();
    let mut text = format!(
        "{}, {codec}\n{} on disk; {:.3} effective bits per weight and tenant",
        manifest.base.name,
        bytes(report.total_bytes),
        report.amortised_bpw,
    );
    if let Some(bits) = report.amortised_bpw_with_base {
        let _ = write!(text, ", {bits:.3} with a share of the base");
    }
    text.push_str("\n\n");
    text.push_str(&drawn(report));
    let rows = report.tenants.iter().map(|tenant| {
        vec![
            tenant.name.clone(),
            format!("{:.3}", tenant.path_bpw),
            format!("{:.3}", tenant.marginal_bpw),
            format!("{:.3}", tenant.attributed_bpw),
            bytes(tenant.own_bytes),
        ]
    });
    let header = ["bits per weight of", "on its path", "only its own", "with its shares", "rest"];
    let _ = write!(text, "\n{}", table(&header, 1, rows.collect()));
    text
}

/// A codec as it is written on the command line.
struct CodecText<'a>(&'a str, &'a serde_json::Map<String, Value>);

impl std::fmt::Display for CodecText<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)?;
        for (i, (option, value)) in self.1.iter().enumerate() {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            write!(f, "{}{option}={value}", if i == 0 { ":" } else { "," })?;
        }
        Ok(())
    }
}

/// The paths of all tenants as one tree: a node is below those that are added before it.
fn drawn(report: &FamilyReport) -> String {
    let known: BTreeMap<Digest, &NodeReport> =
        report.nodes.iter().map(|node| (node.blake3, node)).collect();
    let ways: Vec<Way<'_>> =
        report.tenants.iter().map(|t| (t.name.as_str(), &t.nodes[..])).collect();
    let mut text = String::new();
    draw(&ways, &known, "", &mut text);
    text
}

/// Names for a line: all, or the first ones and how many more.
fn some_of(names: &[&str]) -> String {
    const SHOWN: usize = 4;
    match names.len().saturating_sub(SHOWN) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names[..SHOWN].join(", ")),
    }
}

/// A tenant and what of its path is still to be drawn.
type Way<'a> = (&'a str, &'a [Digest]);

fn draw(ways: &[Way<'_>], known: &BTreeMap<Digest, &NodeReport>, indent: &str, text: &mut String) {
    let mut branches: Vec<(Digest, Vec<Way<'_>>)> = Vec::new();
    for (name, way) in ways {
        let Some((first, rest)) = way.split_first() else { continue };
        match branches.iter_mut().find(|(node, _)| node == first) {
            Some((_, below)) => below.push((name, rest)),
            None => branches.push((*first, vec![(name, rest)])),
        }
    }
    let n = branches.len();
    for (at, (node, below)) in branches.into_iter().enumerate() {
        let (mark, after) = if at + 1 == n { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let mut names: Vec<&str> = below.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let digest = node.to_string();
        let _ = write!(text, "{indent}{mark}{}… {}", &digest[..8], some_of(&names));
        if let Some(report) = known.get(&node) {
            if let Some(bits) = report.bits {
                let _ = write!(text, "  {bits:.2} bits");
            }
            let _ = write!(text, "  {}", bytes(report.bytes));
            let errors = names.iter().filter_map(|name| report.errors.get(*name)).copied();
            let least = errors.clone().fold(f64::INFINITY, f64::min);
            let most = errors.fold(0.0, f64::max);
            if least <= most {
                let _ = write!(text, "  error {}", number(least));
            }
            if number(least) != number(most) && least < most {
                let _ = write!(text, " to {}", number(most));
            }
        }
        text.push('\n');
        draw(&below, known, &format!("{indent}{after}"), text);
    }
}
