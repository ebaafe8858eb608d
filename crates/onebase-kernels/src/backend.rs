//! Which instruction set runs.

use std::fmt;
use std::sync::OnceLock;

use crate::bytes::{ByteKernel, PortableBytes};
use crate::vector::{Kernel, Portable};
#[cfg(target_arch = "x86_64")]
use crate::x86_64;

/// Environment variable that forces a backend by name.
pub const ENV_OVERRIDE: &str = "ONEBASE_KERNELS";

/// An instruction set that this processor has.
///
/// Values exist only for sets that were detected, so the kernels behind it are
/// safe to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend(Isa);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

/// A backend was asked for that does not exist or that this processor lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnavailableBackend {
    /// The name that was asked for.
    pub got: String,
}

impl fmt::Display for UnavailableBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Backend::available().into_iter().map(Backend::name).collect();
        write!(f, "{ENV_OVERRIDE}={}: this processor has {}", self.got, names.join(", "))
    }
}

impl std::error::Error for UnavailableBackend {}

impl Backend {
    /// Every backend of this processor, the portable one first, the fastest last.
    pub fn available() -> Vec<Backend> {
        #[allow(unused_mut)]
        let mut found = vec![Backend(Isa::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            if x86_64::has_avx2() {
                found.push(Backend(Isa::Avx2));
            }
            if x86_64::has_avx512() {
                found.push(Backend(Isa::Avx512));
            }
            if x86_64::bytes::has_avx512_vnni() {
                found.push(Backend(Isa::Avx512Vnni));
            }
        }
        found
    }

    /// The fastest backend, or the one named by [`ENV_OVERRIDE`].
    ///
    /// # Errors
    /// When the variable names none that this processor has.
    pub fn from_env() -> Result<Backend, UnavailableBackend> {
        let available = Self::available();
        match std::env::var(ENV_OVERRIDE) {
            Ok(name) if !name.is_empty() => available
                .into_iter()
                .find(|b| b.name() == name)
                .ok_or(UnavailableBackend { got: name }),
            _ => Ok(available[available.len() - 1]),
        }
    }

    /// The fastest backend, whatever [`ENV_OVERRIDE`] says: for numbers that end in files.
    pub fn fastest() -> Backend {
        static FASTEST: OnceLock<Backend> = OnceLock::new();
        *FASTEST.get_or_init(|| {
            let available = Self::available();
            available[available.len() - 1]
        })
    }

    /// [`Backend::from_env`], probed once for the life of the process; a bad
    /// override counts as none.
    pub fn active() -> Backend {
        static ACTIVE: OnceLock<Backend> = OnceLock::new();
        *ACTIVE.get_or_init(|| {
            let available = Self::available();
            Self::from_env().unwrap_or(available[available.len() - 1])
        })
    }

    /// `portable`, `avx2`, `avx512` or `avx512vnni`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => "avx512vnni",
        }
    }

    /// Runs a kernel on this backend's lanes.
    ///
    /// # Safety
    /// What the kernel's own fields promise about their pointers holds.
    #[inline]
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: plain code; the kernel's promises are the caller's.
            Isa::Portable => unsafe { kernel.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value exists only where the features were detected.
            Isa::Avx2 => unsafe { x86_64::with_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value exists only where the features were detected.
            Isa::Avx512 | Isa::Avx512Vnni => unsafe { x86_64::with_avx512(kernel) },
        }
    }

    /// Runs a kernel on this backend's vectors of bytes.
    ///
    /// # Safety
    /// What the kernel's own fields promise about their pointers holds.
    #[inline]
    pub(crate) unsafe fn run_bytes<K: ByteKernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: plain code; the kernel's promises are the caller's.
            Isa::Portable => unsafe { kernel.run::<PortableBytes>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value exists only where the features were detected.
            Isa::Avx2 => unsafe { x86_64::bytes::with_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value exists only where the features were detected.
            Isa::Avx512 => unsafe { x86_64::bytes::with_avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value exists only where the features were detected.
            Isa::Avx512Vnni => unsafe { x86_64::bytes::with_avx512_vnni(kernel) },
        }
    }
}
