//! A base is quantized, and a fine-tune is compressed against it and answers on it.

// Helpers of tests may panic as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::{Place, demo, onebase};

#[test]
fn a_fine_tune_is_served_on_a_quantized_base() {
    let place = Place::new();
    let [base, math] = ["base", "math"].map(|name| demo(name).to_str().unwrap().to_owned());
    let (quantized, delta) = (place.text("quantized"), place.text("delta"));
    let run = onebase(["quantize", &base, "-o", &quantized, "--method", "quarot"]).exits(0);
    assert!(run.stdout.contains("4 / 8 / 4") && run.stdout.contains("quarot"), "{}", run.stdout);
    let shown = onebase(["inspect", &quantized]).exits(0).stdout;
    assert!(shown.contains("effective bits per linear weight"), "{shown}");
    let compress = ["compress", &quantized, &math, "-o", &delta, "--codec", "rtn"];
    onebase(compress).exits(0);
    onebase(["verify", &quantized, &delta]).exits(0);
    let named = format!("math={delta}");
    let prompt = "What is 12 + 30?";
    let ask = ["generate", &quantized, "--delta", &named, "-p", prompt];
    let run = onebase(ask).exits(0);
    // A sum, as the fine-tune writes it and the base does not.
    assert!(run.stdout.contains(" = "), "{}", run.stdout);
    assert_eq!(place.names(), ["delta", "quantized"]);
}
