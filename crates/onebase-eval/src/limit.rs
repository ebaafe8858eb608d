//! The limit line: the least error that a code of some size could have.
//!
//! **Model.** The rows of a delta, taken along its longer side, are independent
//! draws of one Gaussian whose covariance the decoder knows without being told. The
//! least mean squared error at a rate is then known exactly: each eigendirection of
//! variance λ gets `max(0, ½ log₂(λ/θ))` bits per row and is left with the error
//! `min(λ, θ)`, with one water level θ for all directions (T. Cover and J. Thomas,
//! "Elements of Information Theory", 2nd ed., theorem 10.3.3). One θ over all
//! sites is equal slope: no bit could be moved to where it helps more.
//!
//! **Variances.** A delta's squared singular values over the number of rows are the
//! eigenvalues of the rows' sample covariance, and these are spread wider than the
//! true ones: of a square matrix of independent equal Gaussians, whose rows have no
//! structure at all, they would promise half the true error at one bit. They are
//! pulled together by the quadratic-inverse shrinkage of O. Ledoit and M. Wolf
//! ("Quadratic shrinkage for large covariance matrices", Bernoulli 28(3), 2022),
//! which keeps their sum.
//!
//! **What it is not.** Real deltas are not exactly Gaussian; a code that uses other
//! structure, such as zeros or equal tensors, can lie below the line. A real code has to
//! be told the directions, which the line gets for free. Shrunken variances are
//! those along the delta's own singular directions; whoever knew the true ones could do a
//! little better.

/// How far the water level can lie below the largest variance, in octaves: a
/// hundred bits per weight.
const DEPTH: f64 = 200.0;

/// The ratio of two water levels whose points of the curve are neighbours: an
/// eighth of a bit where all directions have some.
const CURVE_STEP: f64 = 0.840_896_415_253_714_6;

/// Where a curve ends at the latest: nothing that matters is lost.
const LEAST_ERROR: f64 = 1e-6;

/// Halvings of the interval of water levels.
const N_HALVINGS: usize = 64;

/// Variances of the directions of one delta's rows.
#[derive(Clone, Debug)]
pub(crate) struct Spectrum {
    /// Descending, the zeros left out.
    variances: Vec<f64>,
    /// Rows along the longer side.
    n_rows: f64,
}

impl Spectrum {
    /// The spectrum of a delta of some shape, from its squared singular values in
    /// descending order.
    pub(crate) fn new(squared_singular_values: &[f64], [m, n]: [usize; 2]) -> Self {
        let n_rows = m.max(n);
        let largest = squared_singular_values.first().copied().unwrap_or(0.0);
        // What is below the rounding of the decomposition is no direction.
        let floor = largest * 1e-12;
        let values = squared_singular_values.iter().take_while(|value| **value > floor);
        let values: Vec<f64> = values.copied().collect();
        let n_directions = values.len();
        let Shrunk { mut variances, .. } = Shrunk::new(&values, n_rows, n_directions);
        variances.sort_by(|a, b| b.total_cmp(a));
        #[allow(clippy::cast_precision_loss)]
        Self { variances, n_rows: n_rows as f64 }
    }

    /// The spectrum of `n_rows` rows with variances that are known but for rounding,
    /// scaled to an energy.
    pub(crate) fn known(mut variances: Vec<f64>, n_rows: usize, energy: f64) -> Self {
        variances.retain(|variance| *variance > 0.0);
        #[allow(clippy::cast_precision_loss)]
        let n_rows = n_rows as f64;
        let scale = energy / (n_rows * variances.iter().sum::<f64>());
        if scale.is_finite() {
            variances.iter_mut().for_each(|variance| *variance *= scale);
        }
        Self { variances, n_rows }
    }

    /// Variances, descending; those that are zero may be left out.
    pub(crate) fn variances(&self) -> &[f64] {
        &self.variances
    }

    /// Bits at a water level.
    pub(crate) fn bits(&self, level: f64) -> f64 {
        let above = self.variances.iter().take_while(|v| **v > level);
        self.n_rows * above.map(|v| 0.5 * (v / level).log2()).sum::<f64>()
    }

    /// The squared error at a water level.
    pub(crate) fn error(&self, level: f64) -> f64 {
        self.n_rows * self.variances.iter().map(|v| v.min(level)).sum::<f64>()
    }
}

/// Variances of rows along the directions of a sample of them.
pub(crate) struct Shrunk {
    /// Along the sample's own directions, in the order of its squared singular values.
    pub(crate) variances: Vec<f64>,
    /// Along every other.
    pub(crate) rest: f64,
}

impl Shrunk {
    /// The quadratic-inverse shrinkage of the covariance of `n_rows` rows in `n`
    /// dimensions, from their squared singular values, all positive and descending, at
    /// most as many as either. The sum of all variances is the sample's.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn new(squared_singular_values: &[f64], n_rows: usize, n: usize) -> Self {
        // Fewer directions than rows could show are all that there are. As many as rows
        // leave it open what lies along the others.
        let n_seen = squared_singular_values.len();
        let n_unseen = if n_seen == n_rows { n - n_seen } else { 0 };
        let (n_rows, p) = (n_rows as f64, (n_seen + n_unseen) as f64);
        let sample: Vec<f64> = squared_singular_values.iter().map(|v| v / n_rows).collect();
        let (count, c) = (n_seen as f64, p / n_rows);
        // The paper's smoothing parameter, of the inverse eigenvalues.
        let h = c.min(c.recip()).powf(0.7) / p.powf(0.35);
        let inverse: Vec<f64> = sample.iter().map(|v| v.recip()).collect();
        let mut variances: Vec<f64> = inverse
            .iter()
            .map(|own| {
                // The smoothed Stein shrinker and its conjugate.
                let (mut theta, mut conjugate) = (0.0, 0.0);
                for other in &inverse {
                    let difference = other - own;
                    let squares = difference * difference + (h * other).powi(2);
                    theta += other * difference / squares;
                    conjugate += h * other * other / squares;
                }
                let (theta, conjugate) = (theta / count, conjugate / count);
                let amplitude = theta * theta + conjugate * conjugate;
                let inverse = if n_unseen > 0 {
                    own * amplitude
                } else {
                    (1.0 - c).powi(2) * own
                        + 2.0 * c * (1.0 - c) * own * theta
                        + c * c * own * amplitude
                };
                inverse.recip()
            })
            .collect();
        let mut rest = 0.0;
        if n_unseen > 0 {
            rest = ((c - 1.0) * inverse.iter().sum::<f64>() / count).recip();
        }
        let total = variances.iter().sum::<f64>() + rest * n_unseen as f64;
        if total > 0.0 {
            let scale = sample.iter().sum::<f64>() / total;
            variances.iter_mut().for_each(|v| *v *= scale);
            rest *= scale;
        }
        Self { variances, rest }
    }
}

/// The limit line of several deltas together.
#[derive(Clone, Debug)]
pub(crate) struct Limit {
    spectra: Vec<Spectrum>,
    n_weights: f64,
    energy: f64,
}

impl Limit {
    /// The line of sites with these spectra and `n_weights` weights in all.
    #[allow(clippy::cast_precision_loss)]
    pub(crate) fn new(spectra: Vec<Spectrum>, n_weights: u64) -> Self {
        let energy = spectra.iter().map(|s| s.error(f64::INFINITY)).sum();
        Self { spectra, n_weights: n_weights as f64, energy }
    }

    fn largest_variance(&self) -> f64 {
        let largest = self.spectra.iter().filter_map(|s| s.variances.first());
        largest.fold(0.0, |a: f64, b| a.max(*b))
    }

    fn bits_at(&self, level: f64) -> f64 {
        self.spectra.iter().map(|s| s.bits(level)).sum::<f64>() / self.n_weights
    }

    fn error_at(&self, level: f64) -> f64 {
        self.spectra.iter().map(|s| s.error(level)).sum::<f64>() / self.energy
    }

    /// The water level at which `bits` per weight are spent; `None` where less would
    /// lose nothing that matters.
    pub(crate) fn level_of(&self, bits: f64) -> Option<f64> {
        let level = (self.energy > 0.0).then(|| self.level(|level| self.bits_at(level) > bits));
        level.filter(|level| self.error_at(*level) > LEAST_ERROR)
    }

    /// The water level at which `is_low` turns from true to false.
    fn level(&self, is_low: impl Fn(f64) -> bool) -> f64 {
        let largest = self.largest_variance().log2();
        let (mut low, mut high) = (largest - DEPTH, largest);
        for _ in 0..N_HALVINGS {
            let middle = f64::midpoint(low, high);
            if is_low(middle.exp2()) { low = middle } else { high = middle }
        }
        high.exp2()
    }

    /// Points `[bits per weight, least relative squared error]` of the line, from
    /// no bits to `max_bits` or where nothing that matters is lost.
    pub(crate) fn curve(&self, max_bits: f64) -> Vec<[f64; 2]> {
        let mut points = vec![[0.0, 1.0]];
        let mut level = self.largest_variance();
        while self.energy > 0.0
            && points.last().is_some_and(|p| p[0] < max_bits && p[1] > LEAST_ERROR)
        {
            level *= CURVE_STEP;
            points.push([self.bits_at(level), self.error_at(level)]);
        }
        points
    }

    /// The least relative squared error at `bits` per weight.
    #[cfg(test)]
    fn error(&self, bits: f64) -> f64 {
        if self.energy <= 0.0 {
            return 0.0;
        }
        if bits <= 0.0 {
            return 1.0;
        }
        self.error_at(self.level(|level| self.bits_at(level) > bits))
    }

    /// The least bits per weight for a relative squared error; `None` for an error
    /// of zero, which no finite code reaches.
    pub(crate) fn bits(&self, error: f64) -> Option<f64> {
        if error >= 1.0 || self.energy <= 0.0 {
            return Some(0.0);
        }
        (error > 0.0).then(|| self.bits_at(self.level(|level| self.error_at(level) < error)))
    }
}

#[cfg(test)]
mod tests {
    use onebase_codec::numerics::{gram, symmetric_eigenvalues};
    use onebase_codec::{CODECS, CodecSpec, Kind};
    use onebase_tensor::{MatrixRef, effective_bits, stream};
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    /// Independent draws of the standard normal.
    fn gaussian(label: &str, n: usize) -> Vec<f64> {
        let mut rng = stream(5, label, 0);
        (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
    }

    fn limit(matrix: &[f64], shape: [usize; 2]) -> Limit {
        let (small, n) = gram(matrix, shape);
        let eigenvalues = symmetric_eigenvalues(&small, n).unwrap();
        Limit::new(vec![Spectrum::new(&eigenvalues, shape)], (shape[0] * shape[1]) as u64)
    }

    #[track_caller]
    fn close(got: f64, expected: f64, tolerance: f64) {
        assert!((got / expected - 1.0).abs() < tolerance, "expected {expected}, got {got}");
    }

    /// Independent equal Gaussians have no structure: the error is `2^(-2 bits)`,
    /// a quarter at one bit, whatever the shape.
    #[test]
    fn independent_gaussians() {
        for shape in [[256, 256], [768, 256], [128, 256], [2048, 64]] {
            let limit = limit(&gaussian("iid", shape[0] * shape[1]), shape);
            close(limit.error(1.0), 0.25, 0.03);
            for bits in [0.25, 0.5, 2.0, 3.0] {
                close(limit.error(bits), (-2.0 * bits).exp2(), 0.05);
                close(limit.bits((-2.0 * bits).exp2()).unwrap(), bits, 0.1);
            }
        }
    }

    /// Of fewer rows than dimensions, what lies along the directions that no row shows is
    /// as large as along the others.
    #[test]
    fn directions_that_no_row_shows() {
        for shape @ [m, n] in [[100, 300], [256, 768]] {
            let (small, k) = gram(&gaussian("rows", m * n), shape);
            let Shrunk { variances, rest } =
                Shrunk::new(&symmetric_eigenvalues(&small, k).unwrap(), m, n);
            close(rest, 1.0, 0.1);
            close(variances.iter().sum::<f64>() / variances.len() as f64, 1.0, 0.1);
        }
        // Of low rank there are no others.
        assert_eq!(Shrunk::new(&[4.0, 2.0], 10, 30).rest, 0.0);
    }

    /// A matrix of rank `r` with equal singular values has no other direction: all
    /// bits go to `r` of `n`.
    #[test]
    fn a_matrix_of_low_rank() {
        let (n, r) = (64, 8);
        let shape = [n, n];
        let mut matrix = vec![0.0; n * n];
        (0..r).for_each(|i| matrix[i * n + i] = 3.0);
        let limit = limit(&matrix, shape);
        // One bit per weight is `n / r` bits for each that counts.
        close(limit.error(1.0), (-2.0 * 8.0f64).exp2(), 1e-9);
        close(limit.error(1.0 / 8.0), 0.25, 1e-9);
        close(limit.bits(0.25).unwrap(), 1.0 / 8.0, 1e-9);
        assert_eq!((limit.error(0.0), limit.bits(1.0)), (1.0, Some(0.0)));
    }

    /// Where the water reaches the weaker of two levels, all error there is still
    /// the whole of it, and the stronger has half the logarithm of the ratio.
    #[test]
    fn the_threshold_between_two_levels() {
        let spectrum = Spectrum { variances: vec![16.0, 16.0, 1.0, 1.0], n_rows: 100.0 };
        let limit = Limit::new(vec![spectrum], 400);
        let (bits, error) = (0.5 * 2.0, 4.0 / 34.0);
        close(limit.error(bits), error, 1e-9);
        close(limit.bits(error).unwrap(), bits, 1e-9);
        // Past it every weight gets its share.
        close(limit.error(bits + 1.0), error / 4.0, 1e-9);
    }

    /// Bits flow to the site where they help more until the slopes are equal.
    #[test]
    fn sites_share_one_level() {
        let one = |variance| Spectrum { variances: vec![variance], n_rows: 10.0 };
        let limit = Limit::new(vec![one(4.0), one(1.0)], 20);
        // One bit for each weight of the first, none for the second.
        close(limit.error(0.5), 2.0 / 5.0, 1e-9);
        close(limit.error(1.5), 0.5 / 5.0, 1e-9);
    }

    #[test]
    fn the_curve_is_the_line() {
        let limit = limit(&gaussian("curve", 64 * 256), [64, 256]);
        let curve = limit.curve(3.0);
        assert_eq!(curve[0], [0.0, 1.0]);
        assert!(curve.last().unwrap()[0] >= 3.0);
        for [bits, error] in &curve[1..] {
            close(limit.error(*bits), *error, 1e-6);
        }
        assert!(curve.is_sorted_by(|a, b| a[0] <= b[0] && a[1] >= b[1]));
    }

    #[test]
    fn nothing_costs_nothing() {
        let limit = Limit::new(vec![Spectrum::new(&[0.0, 0.0], [2, 2])], 4);
        assert_eq!((limit.error(1.0), limit.bits(0.5)), (0.0, Some(0.0)));
        assert_eq!(limit.curve(1.0), [[0.0, 1.0]]);
        let some = Limit::new(vec![Spectrum::new(&[1.0], [1, 1])], 1);
        assert_eq!(some.bits(0.0), None);
    }

    /// No codec, with any of its options, lies below the line of Gaussian data:
    /// independent, with rows of different power, and with correlated columns.
    #[test]
    fn no_codec_lies_below_it_on_gaussian_data() {
        let shape @ [rows, cols] = [256, 128];
        let independent = gaussian("w", rows * cols);
        let powers: Vec<f64> =
            (0..rows * cols).map(|i| independent[i] * (1.0 + (i / cols) as f64 / 64.0)).collect();
        let correlated: Vec<f64> =
            (0..rows * cols)
                .map(|i| {
                    if i % cols == 0 { independent[i] } else { independent[i] + independent[i - 1] }
                })
                .collect();
        for matrix in [independent, powers, correlated] {
            let limit = limit(&matrix, shape);
            #[allow(clippy::cast_possible_truncation)]
            let delta: Vec<f32> = matrix.iter().map(|v| 1e-3 * *v as f32).collect();
            for spec in specs() {
                let encoded = spec.encode(&MatrixRef::new(&delta, rows, cols).unwrap()).unwrap();
                let bits = effective_bits(encoded.size_bytes() as u64, (rows * cols) as u64);
                let mut decoded = vec![0.0; rows * cols];
                spec.prepare(encoded).unwrap().write_rows(0..rows, &mut decoded);
                let square = |v: f32| f64::from(v).powi(2);
                let lost: f64 = delta.iter().zip(&decoded).map(|(a, b)| square(a - b)).sum();
                let error = lost / delta.iter().map(|v| square(*v)).sum::<f64>();
                // In f32 nothing is lost but its rounding, which is not the code's.
                if error > 1e-12 {
                    let least = limit.bits(error).unwrap();
                    assert!(bits > least, "{spec}: {bits} bits, the line is at {least}");
                }
            }
        }
    }

    /// Every codec over the range of its options.
    fn specs() -> Vec<CodecSpec> {
        let mut texts: Vec<String> = CODECS.iter().map(|c| c.name().to_owned()).collect();
        for codec in CODECS {
            for option in codec.options() {
                let values: Vec<String> = match option.kind {
                    Kind::Int { min, max, .. } => {
                        [min, usize::midpoint(min, max) & !15, max].map(|v| v.to_string()).into()
                    }
                    Kind::Choice(words) => words.iter().map(|w| (*w).to_owned()).collect(),
                    Kind::Number { min, max, .. } => [min, 0.25, 1.0, 3.0, max]
                        .iter()
                        .filter(|v| (min..=max).contains(*v))
                        .map(f64::to_string)
                        .collect(),
                };
                let spec = |v: &String| format!("{}:{}={v}", codec.name(), option.name);
                texts.extend(values.iter().map(spec));
            }
        }
        texts.iter().filter_map(|text| text.parse().ok()).collect()
    }
}
