//! A made-up delta and inputs of it, for comparisons of methods in the space of singular
//! vectors.

use onebase_codec::{CodecSpec, SecondMoment};
use onebase_tensor::{MatrixRef, stream};
use rand_distr::{Distribution, StandardNormal};

/// A delta `[n, n]` and the inputs that it is measured on.
pub(crate) struct Example {
    n: usize,
    delta: Vec<f32>,
    calibration: SecondMoment,
    /// `[n, n]`, of other inputs than the calibration's.
    held_out: Vec<f64>,
}

fn gaussian(seed: u64, label: &str, n: usize) -> Vec<f64> {
    let mut rng = stream(seed, label, 0);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

/// The Gram matrix of the columns of rows of length `n`.
fn gram(rows: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for row in rows.chunks(n) {
        for (out, x) in out.chunks_mut(n).zip(row) {
            out.iter_mut().zip(row).for_each(|(out, y)| *out += x * y);
        }
    }
    out
}

impl Example {
    /// Singular values `i^-decay` between random directions; inputs with a common part and
    /// a few channels that are four times as large.
    pub(crate) fn new(n: usize, decay: f64, seed: u64) -> Self {
        // Random directions: what Gram and Schmidt leave of random vectors.
        let orthonormal = |label: &str| {
            let mut rows = gaussian(seed, label, n * n);
            for i in 0..n {
                for j in 0..i {
                    let (before, row) = rows.split_at_mut(i * n);
                    let (other, row) = (&before[j * n..(j + 1) * n], &mut row[..n]);
                    let dot: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                    row.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
                }
                let row = &mut rows[i * n..(i + 1) * n];
                let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                row.iter_mut().for_each(|x| *x /= length);
            }
            rows
        };
        let (u, v) = (orthonormal("u"), orthonormal("v"));
        let mut wide = vec![0.0; n * n];
        for i in 0..n {
            let s = ((i + 1) as f64).powf(-decay);
            for (row, u) in wide.chunks_mut(n).zip(&u[i * n..(i + 1) * n]) {
                row.iter_mut().zip(&v[i * n..(i + 1) * n]).for_each(|(w, v)| *w += s * u * v);
            }
        }
        let delta = wide.into_iter().map(|w| w as f32).collect();
        let n_common = n / 2;
        let mixing = gaussian(seed, "mixing", n_common * n);
        let inputs = |label: &str| {
            let (n_rows, noise) = (4 * n, gaussian(seed, label, 4 * n * n));
            let common = gaussian(seed, &format!("common {label}"), n_rows * n_common);
            let mut rows = noise;
            for (row, common) in rows.chunks_mut(n).zip(common.chunks(n_common)) {
                for (c, mixing) in common.iter().zip(mixing.chunks(n)) {
                    let c = c / (n_common as f64).sqrt();
                    row.iter_mut().zip(mixing).for_each(|(x, m)| *x += c * m);
                }
                row.iter_mut().step_by(n / 8).for_each(|x| *x *= 4.0);
            }
            gram(&rows, n)
        };
        let calibration = inputs("calibration").into_iter().map(|x| x as f32).collect();
        let calibration = SecondMoment::new(calibration, n).unwrap();
        Self { n, delta, calibration, held_out: inputs("held out") }
    }

    /// `‖X (D − D̂)ᵀ‖² / ‖X Dᵀ‖²` on inputs that were not calibrated on.
    pub(crate) fn error(&self, codec: &str) -> f64 {
        let n = self.n;
        let spec: CodecSpec = codec.parse().unwrap();
        let source = MatrixRef::new(&self.delta, n, n).unwrap();
        let encoded = match spec.calibrated() {
            Some(codec) => {
                codec.encode_calibrated(spec.options(), &source, &self.calibration).unwrap()
            }
            None => spec.encode(&source).unwrap(),
        };
        let mut decoded = vec![0.0; n * n];
        spec.prepare(encoded).unwrap().write_rows(0..n, &mut decoded);
        let lost: Vec<f64> =
            self.delta.iter().zip(&decoded).map(|(w, d)| f64::from(*w) - f64::from(*d)).collect();
        let all: Vec<f64> = self.delta.iter().map(|w| f64::from(*w)).collect();
        self.power(&lost) / self.power(&all)
    }

    /// `tr(D G Dᵀ)`.
    fn power(&self, rows: &[f64]) -> f64 {
        let weigh = |row: &[f64]| -> f64 {
            let products = self.held_out.chunks(self.n).zip(row);
            products.map(|(g, x)| x * g.iter().zip(row).map(|(g, y)| g * y).sum::<f64>()).sum()
        };
        rows.chunks(self.n).map(weigh).sum()
    }
}

/// The methods of the comparison at one bit per weight of the codes.
pub(crate) const METHODS: [(&str, &str); 14] = [
    ("8/3/2, u as it is", "delta-come"),
    ("8/3/2, u for the pairs kept", "delta-come:target=kept"),
    ("8/3/2, u for the delta", "delta-come:target=delta"),
    (
        "optimal, u as it is",
        "deltamix:count=codes,grid=group,target=none,sweeps=0,blend=0,widths=8",
    ),
    (
        "optimal, u for the pairs kept",
        "deltamix:count=codes,grid=group,target=kept,sweeps=0,blend=0,widths=8",
    ),
    (
        "optimal, u for the delta",
        "deltamix:count=codes,grid=group,target=delta,sweeps=0,blend=0,widths=8",
    ),
    ("one width", "deltamix:count=codes,grid=group,target=delta,sweeps=0,blend=0,widths=1"),
    ("two widths", "deltamix:count=codes,grid=group,target=delta,sweeps=0,blend=0,widths=2"),
    ("three widths", "deltamix:count=codes,grid=group,target=delta,sweeps=0,blend=0,widths=3"),
    ("a sweep more", "deltamix:count=codes,grid=group,target=delta,sweeps=1,blend=0,widths=8"),
    (
        "a scale for each pair",
        "deltamix:count=codes,grid=pair,target=delta,sweeps=0,blend=0,widths=8",
    ),
    ("both", "deltamix:count=codes,grid=pair,target=delta,sweeps=1,blend=0,widths=8"),
    ("rank 16 in bf16 for 512 x 512", "low-rank:bits=1"),
    ("signs, one scale", "sign:scale=matrix"),
];
