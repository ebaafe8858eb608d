/// Who is told how far a long run has come.
pub trait Progress: Sync {
    /// A run over `total_bytes` begins.
    fn begin(&self, total_bytes: u64);

    /// Of it, an earlier process has done as many tensors.
    fn resumed(&self, n_tensors: usize);

    /// Work on a tensor begins.
    fn tensor(&self, name: &str);

    /// That many more bytes are done.
    fn advance(&self, bytes: u64);

    /// Something is done otherwise than was asked for.
    fn warn(&self, message: &str);
}

/// Nobody is told.
#[derive(Clone, Copy, Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: u64) {}
    fn resumed(&self, _: usize) {}
    fn tensor(&self, _: &str) {}
    fn advance(&self, _: u64) {}
    fn warn(&self, _: &str) {}
}
