use onebase_codec::{CodecSpec, DeltaSource, Kind, read_finite};
use onebase_format::artifact::Role;
use onebase_model::TensorSpec;
use onebase_tensor::PartSpec;
use rayon::prelude::*;
use serde_json::Value;

use crate::budget::Known;
use crate::calibration::quadratic_form;
use crate::pair::{TensorDelta, read_widened};
use crate::plan::encode;
use crate::{Budget, Error, Pair, Plan, Progress, Result};

/// Sizes that a site may have, as multiples of the one that all would have.
const LADDER: [f64; 10] = [0.55, 0.65, 0.75, 0.87, 1.0, 1.15, 1.35, 1.6, 2.0, 2.5];

/// Weights that are read at a time.
const BLOCK_WEIGHTS: usize = 1 << 16;

/// Halvings of the range of bytes that sites may take in all.
const HALVINGS: usize = 24;

/// One site at one size.
struct Rung {
    codec: CodecSpec,
    bytes: usize,
    /// Squared error of the delta over the squared norm of the weights, or of the outputs
    /// of both.
    error: f64,
}

impl Budget {
    /// Gives each linear site of a plan that is within the budget a size of its own, so
    /// that the sum over the sites of `‖Δ − Δ̂‖² / ‖W‖²` is least in the same bytes, `W`
    /// being the base's weights: every site is encoded at several sizes, and bytes go
    /// where they lower that sum most. With statistics it is what outputs lose,
    /// `tr((Δ − Δ̂) M (Δ − Δ̂)ᵀ) / tr(W M Wᵀ)` for the moment `M` of the inputs and the
    /// fine-tune's weights `W`.
    ///
    /// # Errors
    /// When the codec cannot choose its bits or use the plan's statistics, or a checkpoint
    /// or the statistics cannot be read.
    pub fn allocate(self, pair: &Pair, plan: &Plan, progress: &dyn Progress) -> Result<Plan> {
        plan.check_calibration()?;
        plan.check_any_order("an allocation of sizes")?;
        let known = Known::of(pair)?;
        let candidates = candidates(&plan.linear)?;
        let sites: Vec<&TensorSpec> = (0..pair.specs.len())
            .filter(|index| pair.specs[*index].role == Role::Linear && !known.unchanged[*index])
            .map(|index| &pair.specs[index])
            .collect();
        let mut total = 0;
        for site in &sites {
            total += pair.fine_tune.tensor(&site.name)?.size_bytes() as u64;
        }
        progress.begin(total);
        let mut ladders = Vec::new();
        for site in &sites {
            progress.tensor(&site.name);
            ladders.push(ladder(&candidates, plan, site, &pair.delta(&site.name)?)?);
            progress.advance(pair.fine_tune.tensor(&site.name)?.size_bytes() as u64);
        }
        let in_bytes = |n_bytes: usize| {
            let chosen = choose(&ladders, n_bytes)?;
            let codecs = ladders.iter().zip(chosen).map(|(ladder, rung)| &ladder[rung].codec);
            let named = sites.iter().zip(codecs);
            let sites = named.map(|(site, codec)| (site.name.clone(), codec.clone())).collect();
            Some(Plan { sites, ..plan.clone() })
        };
        let mut best = plan.clone();
        let (mut low, mut high) =
            (0, ladders.iter().filter_map(|ladder| ladder.last()).map(|rung| rung.bytes).sum());
        for _ in 0..HALVINGS {
            let middle = usize::midpoint(low, high) + 1;
            let allocated = in_bytes(middle);
            let holds = match &allocated {
                Some(allocated) => self.holds(&known.sizes(pair, allocated)?, pair),
                // Not even the least sizes are within them.
                None => true,
            };
            if holds {
                low = middle.min(high);
                best = allocated.unwrap_or(best);
            } else {
                high = middle - 1;
            }
        }
        Ok(best)
    }
}

/// The codec at the sizes of the ladder, ascending.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn candidates(codec: &CodecSpec) -> Result<Vec<CodecSpec>> {
    let refused = || Error::OneSize { codec: codec.to_string() };
    let option = codec.bits_option().ok_or_else(refused)?;
    let mut values: Vec<Value> = Vec::new();
    for factor in LADDER {
        let value: Value = match option.kind {
            Kind::Number { min, max, .. } => {
                let bits = factor * codec.options().number(option.name);
                ((bits * 100.0).round() / 100.0).clamp(min, max).into()
            }
            Kind::Int { min, max, .. } => {
                let bits = factor * codec.options().int(option.name) as f64;
                (bits.round() as usize).clamp(min, max).into()
            }
            Kind::Choice(_) => return Err(refused()),
        };
        if values.last() != Some(&value) {
            values.push(value);
        }
    }
    let codecs =
        values.into_iter().map(|value| codec.with(option.name, value).map_err(|_| refused()));
    codecs.collect()
}

fn bytes_of(codec: &CodecSpec, shape: [usize; 2]) -> Result<usize> {
    let parts = codec.most_parts(shape);
    let parts = parts.ok_or_else(|| Error::UnknownSize { codec: codec.to_string() })?;
    Ok(parts.iter().map(PartSpec::size_bytes).sum())
}

/// What a site costs and loses at each size; of sizes that are not on the lower convex
/// hull nothing is kept.
fn ladder(
    candidates: &[CodecSpec],
    plan: &Plan,
    site: &TensorSpec,
    delta: &TensorDelta<'_>,
) -> Result<Vec<Rung>> {
    let n_cols = delta.shape()[1];
    let moment = plan.moment(site)?;
    let weigh = |rows: &[f32]| match &moment {
        Some(moment) => quadratic_form(rows, n_cols, moment.values()),
        None => rows.iter().map(|v| f64::from(*v).powi(2)).sum(),
    };
    let whole = if moment.is_some() { &delta.fine_tune } else { &delta.base };
    let norm = sum_over_blocks(delta, |rows| {
        let mut weights = vec![0.0; rows.len() * n_cols];
        let offset = rows.start * n_cols * whole.dtype().size_bytes();
        read_widened(whole, offset, &mut weights)?;
        Ok(weigh(&weights))
    })?;
    let mut hull: Vec<Rung> = Vec::new();
    for codec in candidates {
        let draft = codec.draft();
        let encoded = encode(&draft, delta, moment.as_deref())?;
        let prepared = draft.prepare(encoded).map_err(|e| delta.explain(e))?;
        let lost = sum_over_blocks(delta, |rows| {
            let wanted = read_finite(delta, rows.clone()).map_err(|e| delta.explain(e))?;
            let mut got = vec![0.0; wanted.len()];
            prepared.write_rows(rows, &mut got);
            got.iter_mut().zip(&wanted).for_each(|(got, wanted)| *got = wanted - *got);
            Ok(weigh(&got))
        })?;
        let rung = Rung {
            codec: codec.clone(),
            bytes: bytes_of(codec, delta.shape())?,
            error: lost / norm.max(f64::MIN_POSITIVE),
        };
        while let Some(last) = hull.last()
            && (rung.bytes <= last.bytes || hull.len() > 1 && is_above(&hull, &rung))
        {
            if rung.bytes <= last.bytes && rung.error >= last.error {
                break;
            }
            hull.pop();
        }
        if hull.last().is_none_or(|last| rung.error < last.error) {
            hull.push(rung);
        }
    }
    Ok(hull)
}

/// Whether the last rung lies above the line from the one before it to the next.
fn is_above(hull: &[Rung], next: &Rung) -> bool {
    let [.., before, last] = hull else { return false };
    slope(before, last) <= slope(before, next)
}

/// By how much a byte lowers the error from one rung to a larger one.
#[allow(clippy::cast_precision_loss)]
fn slope(from: &Rung, to: &Rung) -> f64 {
    (from.error - to.error) / (to.bytes as f64 - from.bytes as f64)
}

/// The rung of each site that lowers the sum of errors most in these bytes, as steps up
/// the hulls are taken in the order of what a byte gains; `None` where not even the
/// least are within them.
fn choose(ladders: &[Vec<Rung>], n_bytes: usize) -> Option<Vec<usize>> {
    let least: usize = ladders.iter().map(|ladder| ladder.first().map_or(0, |r| r.bytes)).sum();
    let mut left = n_bytes.checked_sub(least)?;
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (site, ladder) in ladders.iter().enumerate() {
        let pairs = ladder.windows(2).enumerate();
        steps.extend(pairs.map(|(i, pair)| (slope(&pair[0], &pair[1]), site, i + 1)));
    }
    // Within a site slopes fall, so that its steps stay in order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut chosen = vec![0; ladders.len()];
    for (_, site, rung) in steps {
        let cost = ladders[site][rung].bytes - ladders[site][rung - 1].bytes;
        if chosen[site] + 1 == rung && cost <= left {
            left -= cost;
            chosen[site] = rung;
        }
    }
    Some(chosen)
}

/// A sum over blocks of rows, the blocks of one size and their sums added in order.
fn sum_over_blocks(
    delta: &TensorDelta<'_>,
    sum: impl Fn(std::ops::Range<usize>) -> Result<f64> + Sync,
) -> Result<f64> {
    let [n_rows, n_cols] = delta.shape();
    let block_rows = (BLOCK_WEIGHTS / n_cols.max(1)).max(1);
    let firsts: Vec<usize> = (0..n_rows).step_by(block_rows).collect();
    let sums: Result<Vec<f64>> =
        firsts.into_par_iter().map(|first| sum(first..n_rows.min(first + block_rows))).collect();
    Ok(sums?.into_iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rung(bytes: usize, error: f64) -> Rung {
        Rung { codec: "sign".parse().unwrap(), bytes, error }
    }

    #[test]
    fn bytes_go_where_they_gain_most() {
        let ladders = [
            vec![rung(10, 8.0), rung(20, 4.0), rung(30, 3.0)],
            vec![rung(10, 1.0), rung(20, 0.9)],
            vec![],
        ];
        assert_eq!(choose(&ladders, 19), None);
        assert_eq!(choose(&ladders, 20), Some(vec![0, 0, 0]));
        assert_eq!(choose(&ladders, 30), Some(vec![1, 0, 0]));
        assert_eq!(choose(&ladders, 40), Some(vec![2, 0, 0]));
        assert_eq!(choose(&ladders, 1000), Some(vec![2, 1, 0]));
    }
}
