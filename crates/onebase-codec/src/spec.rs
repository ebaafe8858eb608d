use std::fmt;
use std::str::FromStr;

use onebase_tensor::{EncodedDelta, PartShapes, PartSpec};
use serde_json::{Map, Value};

use crate::source::reading_bytes;
use crate::{CODECS, Codec, DeltaLinear, DeltaSource, Error, OptionSpec, Options, Result};

/// The option by which codecs say how many bits a weight may take.
const BITS: &str = "bits";

/// The options by which codecs choose how large they are, of which one has one at most.
const SIZE_OPTIONS: [&str; 2] = [BITS, "keep"];

/// The options that say a size: a codec to which one of them is given has it.
const SIZES: [&str; 4] = [BITS, "keep", "rank", "energy"];

/// A codec with its options, written `name` or `name:option=value,option=value`.
#[derive(Clone)]
pub struct CodecSpec {
    codec: &'static dyn Codec,
    options: Options,
}

impl CodecSpec {
    /// The registered codec of a name with the options given, the others at
    /// their defaults.
    ///
    /// # Errors
    /// When the name or an option is unknown or a value is bad.
    pub fn new(name: &str, options: &Map<String, Value>) -> Result<Self> {
        let Some(codec) = CODECS.iter().find(|c| c.name() == name) else {
            let known: Vec<_> = CODECS.iter().map(|c| c.name()).collect();
            let nearest = known.iter().min_by_key(|k| strsim::damerau_levenshtein(k, name));
            let nearest = nearest.copied().unwrap_or_default();
            return Err(Error::UnknownCodec { got: name.to_owned(), nearest, known });
        };
        Ok(Self { codec: *codec, options: Options::new(*codec, options)? })
    }

    /// The codec that wrote parts, from what a manifest says of it.
    ///
    /// # Errors
    /// As [`CodecSpec::new`], and when the parts are of a newer version.
    pub fn from_record(name: &str, version: u32, options: &Map<String, Value>) -> Result<Self> {
        let spec = Self::new(name, options)?;
        let newest = spec.codec.version();
        if version > newest {
            return Err(Error::NewerParts { codec: spec.codec.name(), newest, got: version });
        }
        Ok(spec)
    }

    /// The codec.
    pub fn codec(&self) -> &'static dyn Codec {
        self.codec
    }

    /// Its options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The codec with those of its options that are not at their defaults, and with
    /// the first one, which says most: shorter than [`CodecSpec`]'s text, and read as
    /// the same.
    pub fn short(&self) -> String {
        let mut options = self.options.to_json().clone();
        for (index, option) in self.codec.options().iter().enumerate() {
            if index > 0 && options.get(option.name) == Some(&option.default_value()) {
                options.shift_remove(option.name);
            }
        }
        let given = Options::text(&options);
        let name = self.codec.name();
        if given.is_empty() { name.to_owned() } else { format!("{name}:{given}") }
    }

    /// [`Codec::claimed_bits`] with these options; 0 for a shape without weights.
    pub fn claimed_bits(&self, shape: [usize; 2], parts: &PartShapes) -> f64 {
        if shape.contains(&0) { 0.0 } else { self.codec.claimed_bits(&self.options, shape, parts) }
    }

    /// [`Codec::parts`] with these options, in the order of their names.
    pub fn parts(&self, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let mut parts = self.codec.parts(&self.options, shape)?;
        parts.sort_by_key(|part| part.name);
        Some(parts)
    }

    /// [`Codec::most_parts`] with these options, in the order of their names.
    pub fn most_parts(&self, shape: [usize; 2]) -> Option<Vec<PartSpec>> {
        let mut parts = self.codec.most_parts(&self.options, shape)?;
        parts.sort_by_key(|part| part.name);
        Some(parts)
    }

    /// [`Codec::working_bytes`] with these options, and the blocks that are read by as
    /// many threads.
    pub fn working_bytes(&self, shape: [usize; 2], n_threads: usize) -> usize {
        self.codec.working_bytes(&self.options, shape) + reading_bytes(shape, n_threads)
    }

    /// The option by which the codec chooses how large it is, if it has one.
    pub fn size_option(&self) -> Option<&'static OptionSpec> {
        self.codec.options().iter().find(|option| SIZE_OPTIONS.contains(&option.name))
    }

    /// The option by which the codec says how many bits a weight may take, if it has one.
    pub fn bits_option(&self) -> Option<&'static OptionSpec> {
        self.codec.options().iter().find(|option| option.name == BITS)
    }

    /// The same codec at another value of an option.
    ///
    /// # Errors
    /// When it has no such option or the value is bad.
    pub fn with(&self, option: &str, value: Value) -> Result<Self> {
        let mut options = self.options.to_json().clone();
        options.insert(option.to_owned(), value);
        Self::new(self.codec.name(), &options)
    }

    /// The same codec with [`Codec::draft`].
    pub fn draft(&self) -> Self {
        let values = self.codec.draft().iter();
        values.fold(self.clone(), |spec, (option, value)| {
            spec.with(option, (*value).into()).unwrap_or(spec)
        })
    }

    /// Whether a codec's text says how large it is.
    pub fn says_size(text: &str) -> bool {
        let (_, given) = text.split_once(':').unwrap_or((text, ""));
        let is_size = |pair: &str| pair.split('=').next().is_some_and(|name| SIZES.contains(&name));
        given.split(',').any(is_size)
    }

    /// [`Codec::encode`] with these options.
    ///
    /// # Errors
    /// As there.
    pub fn encode(&self, delta: &dyn DeltaSource) -> Result<EncodedDelta> {
        self.codec.encode(&self.options, delta)
    }

    /// [`Codec::prepare`] with these options.
    ///
    /// # Errors
    /// As there.
    pub fn prepare(&self, delta: EncodedDelta) -> Result<Box<dyn DeltaLinear>> {
        self.codec.prepare(&self.options, delta)
    }
}

impl fmt::Debug for CodecSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CodecSpec({self})")
    }
}

impl fmt::Display for CodecSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.codec.name())?;
        if self.options.to_json().is_empty() {
            return Ok(());
        }
        write!(f, ":{}", self.options)
    }
}

impl FromStr for CodecSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        Self::new(name, &Options::read(rest)?)
    }
}
