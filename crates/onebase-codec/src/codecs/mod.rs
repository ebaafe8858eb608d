//! One file per codec.

/// Declares the modules and the registry from one list.
macro_rules! codecs {
    ($($module:ident::$codec:ident,)*) => {
        $(mod $module;)*

        /// Every codec, in the order in which people should see them.
        pub static CODECS: &[&dyn crate::Codec] = &[$(&$module::$codec,)*];
    };
}

codecs! {
    dense::Dense,
    rtn::Rtn,
    sign::Sign,
    low_rank::LowRank,
    magnitude::Magnitude,
    dare::Dare,
    dqrelo::Dqrelo,
    dqrelo_plus::DqreloPlus,
    delta_come::DeltaCome,
    deltamix::DeltaMix,
    deltadq::DeltaDq,
}

/// The codecs whose deltas can be multiplied by a number in their parts.
pub static RESCALABLE: &[&dyn crate::Rescale] =
    &[&rtn::Rtn, &sign::Sign, &dqrelo::Dqrelo, &deltadq::DeltaDq];

/// The codecs that can weigh errors by the inputs of a site.
pub static CALIBRATED: &[&dyn crate::Calibrated] =
    &[&delta_come::DeltaCome, &deltamix::DeltaMix, &deltadq::DeltaDq];
