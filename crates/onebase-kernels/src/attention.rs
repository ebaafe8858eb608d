//! Softmax attention of one query over the keys it may see.

use crate::Backend;
use crate::vector::{Kernel, LANES, Lanes};

/// One query head against `n` cached positions.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[head_dim]`.
    pub query: &'a [f32],
    /// `[n, head_dim]`, in chunks of whole rows.
    pub keys: &'a [&'a [f32]],
    /// `[n, head_dim]`, in chunks of as many rows.
    pub values: &'a [&'a [f32]],
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl Backend {
    /// `out = softmax(scale · K q)ᵀ V`; `out` is `[head_dim]`, overwritten.
    /// `scores` is scratch space and grows as needed.
    ///
    /// Panics when the shapes do not fit each other or there is no position.
    pub fn attend(self, attention: Attention<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
        let head_dim = attention.query.len();
        assert!(head_dim > 0 && out.len() == head_dim, "head size");
        assert_eq!(attention.keys.len(), attention.values.len(), "chunks");
        for (keys, values) in attention.keys.iter().zip(attention.values) {
            assert!(keys.len().is_multiple_of(head_dim), "keys");
            assert_eq!(keys.len(), values.len(), "keys and values");
        }
        assert!(attention.keys.iter().any(|keys| !keys.is_empty()), "attention over no position");
        // SAFETY: the lengths were checked.
        unsafe { self.run(Attend { attention, scores, out }) }
    }
}

struct Attend<'a> {
    attention: Attention<'a>,
    scores: &'a mut Vec<f32>,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes>(self) {
        let Attention { query, keys, values, scale } = self.attention;
        let head_dim = query.len();
        let scores = self.scores;
        scores.clear();
        // Loops and not closures, as in `load_rows`.
        for keys in keys {
            for key in keys.chunks_exact(head_dim) {
                // SAFETY: both slices have `head_dim` elements.
                scores.push(scale * unsafe { dot::<V>(query, key) });
            }
        }
        let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
        let mut total = 0.0;
        for score in scores.iter_mut() {
            *score = (*score - max).exp();
            total += *score;
        }
        let whole = head_dim - head_dim % LANES;
        for at in (0..whole).step_by(LANES) {
            // SAFETY: `at + LANES` is within every row of `values` and `out`.
            unsafe {
                let mut acc = V::splat(0.0);
                let mut rest = scores.as_slice();
                for values in values {
                    let (own, others) = rest.split_at(values.len() / head_dim);
                    rest = others;
                    for (value, p) in values.chunks_exact(head_dim).zip(own) {
                        acc = V::load(value.as_ptr().add(at)).mul_add(V::splat(*p), acc);
                    }
                }
                acc.store(self.out.as_mut_ptr().add(at));
            }
        }
        for (at, out) in self.out.iter_mut().enumerate().skip(whole) {
            *out = values
                .iter()
                .flat_map(|k| k.chunks_exact(head_dim))
                .zip(scores.iter())
                .map(|(v, p)| v[at] * p)
                .sum();
        }
        let norm = 1.0 / total;
        self.out.iter_mut().for_each(|out| *out *= norm);
    }
}

/// # Safety
/// The slices have the same length.
#[inline(always)]
pub(crate) unsafe fn dot<V: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let whole = a.len() - a.len() % LANES;
    // SAFETY: whole vectors lie within both slices, tails within the buffers.
    unsafe {
        let mut acc = V::splat(0.0);
        for at in (0..whole).step_by(LANES) {
            acc = V::load(a.as_ptr().add(at)).mul_add(V::load(b.as_ptr().add(at)), acc);
        }
        if whole < a.len() {
            let mut tails = [[0.0; LANES]; 2];
            tails[0][..a.len() - whole].copy_from_slice(&a[whole..]);
            tails[1][..a.len() - whole].copy_from_slice(&b[whole..]);
            acc = V::load(tails[0].as_ptr()).mul_add(V::load(tails[1].as_ptr()), acc);
        }
        acc.sum()
    }
}
