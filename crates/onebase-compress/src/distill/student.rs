use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use onebase_codec::DeltaLinear;
use onebase_codec::numerics::product_transposed;
use onebase_format::artifact::Artifact;
use onebase_kernels::Backend;
use onebase_model::{KvCache, Logits, Model, Segment, Tenant};
use onebase_tensor::{MatrixMut, MatrixRef};

use crate::{Progress, Result};

/// The change of a factor by which derivatives are taken. It is far above the rounding
/// of the logits, and small beside the factors, which are near 1.
const STEP: f32 = 1.0 / 64.0;

/// Derivatives of logits that are held at a time, in f64.
const HELD: usize = 1 << 25;

/// A number that is changed between two passes.
#[derive(Clone)]
struct Gain(Arc<AtomicU32>);

impl Gain {
    fn set(&self, value: f32) {
        self.0.store(value.to_bits(), Relaxed);
    }

    fn get(&self) -> f32 {
        f32::from_bits(self.0.load(Relaxed))
    }
}

/// A delta times a gain.
struct Gained {
    delta: Box<dyn DeltaLinear>,
    gain: Gain,
}

impl DeltaLinear for Gained {
    fn shape(&self) -> [usize; 2] {
        self.delta.shape()
    }

    fn add_to(&self, backend: Backend, x: MatrixRef<'_>, y: &mut MatrixMut<'_>) {
        let [n_rows, n_cols] = y.shape();
        let mut products = vec![0.0; n_rows * n_cols];
        let Ok(mut view) = MatrixMut::new(&mut products, n_rows, n_cols) else {
            unreachable!("the buffer was sized for the product")
        };
        self.delta.add_to(backend, x, &mut view);
        let gain = self.gain.get();
        y.data().iter_mut().zip(&products).for_each(|(y, product)| *y += gain * product);
    }

    fn write_rows(&self, rows: std::ops::Range<usize>, out: &mut [f32]) {
        self.delta.write_rows(rows, out);
        let gain = self.gain.get();
        out.iter_mut().for_each(|w| *w *= gain);
    }

    fn resident_bytes(&self) -> usize {
        self.delta.resident_bytes()
    }
}

/// An artifact whose linear sites have a factor each, beside the fine-tune that it is
/// to be like.
pub(super) struct Student<'a> {
    base: &'a Model,
    fine_tune: &'a Model,
    tenant: Tenant,
    /// In the order of the forward pass.
    sites: Vec<(String, Gain)>,
}

impl<'a> Student<'a> {
    pub(super) fn load(base: &'a Model, fine_tune: &'a Model, artifact: &Artifact) -> Result<Self> {
        let mut sites = Vec::new();
        let tenant = Tenant::load_with(base, artifact, &mut |tensor, delta| {
            let gain = Gain(Arc::new(AtomicU32::new(1f32.to_bits())));
            sites.push((tensor.to_owned(), gain.clone()));
            Box::new(Gained { delta, gain })
        })?;
        Ok(Self { base, fine_tune, tenant, sites })
    }

    pub(super) fn n_sites(&self) -> usize {
        self.sites.len()
    }

    /// Which site a tensor is.
    pub(super) fn position(&self, tensor: &str) -> Option<usize> {
        self.sites.iter().position(|(name, _)| name == tensor)
    }

    /// Gives each site its factor.
    pub(super) fn set(&self, factors: &[f32]) {
        self.sites.iter().zip(factors).for_each(|((_, gain), factor)| gain.set(*factor));
    }

    /// The fine-tune's logits of the next tokens, `[n, vocab_size]`.
    fn wanted(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let segment = Segment { tokens, tenant: None, cache, logits: Logits::All };
        Ok(self.fine_tune.forward(&mut [segment])?.concat())
    }

    /// The student's.
    fn own(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Vec<f32>> {
        let segment = Segment { tokens, tenant: Some(&self.tenant), cache, logits: Logits::All };
        Ok(self.base.forward(&mut [segment])?.concat())
    }

    /// The mean squared error of a logit.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn loss(&self, windows: &[&[u32]]) -> Result<f64> {
        let (mut sum, mut n) = (0.0, 0);
        for window in windows {
            let [mut of_wanted, mut of_own] = [0; 2].map(|_| KvCache::new(self.tenant.config()));
            for tokens in window.chunks(self.tokens_at_a_time(2)) {
                let wanted = self.wanted(tokens, &mut of_wanted)?;
                let own = self.own(tokens, &mut of_own)?;
                let errors = wanted.iter().zip(&own).map(|(a, b)| f64::from(a - b).powi(2));
                sum += errors.sum::<f64>();
                n += wanted.len();
            }
        }
        Ok(sum / n.max(1) as f64)
    }

    fn tokens_at_a_time(&self, n_passes: usize) -> usize {
        (HELD / (n_passes * self.tenant.config().vocab_size).max(1)).max(1)
    }

    /// The sums, over all logits of the windows, of the products of each two of: their
    /// derivatives by the factors, and what they lack. `[n_sites + 1, n_sites + 1]`.
    pub(super) fn equations(
        &self,
        windows: &[&[u32]],
        factors: &[f32],
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        self.set(factors);
        let n = self.sites.len() + 1;
        let mut sums = vec![0.0; n * n];
        for window in windows {
            // A changed factor changes what is attended to as well: each has a cache.
            let mut caches: Vec<KvCache> =
                (0..=n).map(|_| KvCache::new(self.tenant.config())).collect();
            for tokens in window.chunks(self.tokens_at_a_time(n)) {
                let (of_sites, of_both) = caches.split_at_mut(n - 1);
                let [of_wanted, of_own] = of_both else { unreachable!("two caches are left") };
                let wanted = self.wanted(tokens, of_wanted)?;
                let own = self.own(tokens, of_own)?;
                let mut rows = Vec::with_capacity(n * own.len());
                for (((_, gain), factor), cache) in self.sites.iter().zip(factors).zip(of_sites) {
                    let changed = factor + STEP;
                    gain.set(changed);
                    let logits = self.own(tokens, cache);
                    gain.set(*factor);
                    let by = f64::from(changed - factor);
                    rows.extend(logits?.iter().zip(&own).map(|(a, b)| f64::from(a - b) / by));
                    progress.advance(tokens.len() as u64);
                }
                rows.extend(wanted.iter().zip(&own).map(|(a, b)| f64::from(a - b)));
                let products = product_transposed(&rows, &rows, [n, own.len(), n]);
                sums.iter_mut().zip(products).for_each(|(sum, p)| sum.add_assign(p));
                progress.advance(2 * tokens.len() as u64);
            }
        }
        Ok(sums)
    }
}
