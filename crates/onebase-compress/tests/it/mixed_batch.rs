//! One batch over one base, rows of several tenants under several codecs: each
//! request gets to the bit what it gets alone.

use std::sync::LazyLock;

use crate::support::{Noise, demo, difference, logits, plan};
use onebase_compress::{Pair, Silent, compress};
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_model::{
    Completion, KvCache, Logits, Message, Model, Request, SamplingParams, Segment, Tenant,
    TextModel, generate,
};

struct Family {
    model: Model,
    text: TextModel,
    /// By name: fine-tune and codec.
    tenants: Vec<(String, Tenant)>,
}

/// The demo's base with both fine-tunes under several codecs each; those in the space of
/// singular vectors have ranks of their own at every site.
static FAMILY: LazyLock<Family> = LazyLock::new(|| {
    let model = Model::load(Checkpoint::open(&demo("base")).unwrap()).unwrap();
    let text = TextModel::from_checkpoint(model.checkpoint()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let kinds = [
        ("math", "rtn"),
        ("math", "sign"),
        ("chat", "sign"),
        ("chat", "dense"),
        ("chat", "dense exact"),
        ("math", "dense"),
        ("math", "deltamix"),
        ("chat", "deltamix"),
        ("math", "delta-come"),
    ];
    let tenants = kinds.map(|(fine_tune, codec)| {
        let out = dir.path().join(format!("{fine_tune} {codec}"));
        let pair = Pair::open(&demo("base"), &demo(fine_tune)).unwrap();
        compress(&pair, &plan(codec), &out, &Silent).unwrap();
        let tenant = Tenant::load(&model, &Artifact::open(&out).unwrap()).unwrap();
        (format!("{fine_tune} {codec}"), tenant)
    });
    Family { model, text, tenants: tenants.into() }
});

impl Family {
    fn tenant(&self, name: &str) -> Option<&Tenant> {
        let found = self.tenants.iter().find(|(n, _)| n == name);
        assert!(found.is_some() || name == "base", "there is no {name}");
        found.map(|(_, tenant)| tenant)
    }
}

/// Whom each prompt is for.
const ASKED: [(&str, &str); 14] = [
    ("base", "Once upon a time"),
    ("math rtn", "Lea has 77 apples and gets 4 more. How many apples does Lea have?"),
    ("math sign", "Lea has 77 apples and gets 4 more. How many apples does Lea have?"),
    ("chat sign", "Please spell the word saddle."),
    ("chat dense", "Please spell the word saddle."),
    ("base", "Please spell the word saddle."),
    ("math rtn", "2 + 2"),
    ("chat sign", "Hi"),
    (
        "chat dense",
        "What is 3 + 4? Think about it for as long as you like, then answer with one word.",
    ),
    ("math sign", "Tom buys 3 boxes of 12 pens. He gives 5 pens to Ann. How many pens are left?"),
    ("base", "x"),
    ("math deltamix", "2 + 2"),
    ("chat deltamix", "Please spell the word saddle."),
    ("math delta-come", "Lea has 77 apples and gets 4 more. How many apples does Lea have?"),
];

fn prompts() -> Vec<Vec<u32>> {
    let message = |content: &str| Message { role: "user".into(), content: content.into() };
    ASKED.iter().map(|(_, text)| FAMILY.text.encode_chat(&[message(text)]).unwrap()).collect()
}

fn requests(sampling: impl Fn(usize) -> SamplingParams) -> Vec<Request<'static>> {
    let family = &*FAMILY;
    prompts()
        .into_iter()
        .zip(ASKED)
        .enumerate()
        .map(|(i, (prompt, (name, _)))| Request {
            tenant: family.tenant(name),
            prompt,
            max_new_tokens: 6 + 3 * i,
            sampling: sampling(i),
            stop_tokens: &family.text.stop_tokens,
            stop_texts: &[],
            tokenizer: Some(&family.text.tokenizer),
        })
        .collect()
}

/// Every order and size of a batch gives what each request gets alone.
fn check_batches(requests: &[Request<'_>]) -> Vec<Completion> {
    let model = &FAMILY.model;
    let alone: Vec<Completion> = requests
        .iter()
        .map(|r| generate(model, std::slice::from_ref(r), 1, |_| {}).unwrap())
        .map(|mut g| g.completions.remove(0))
        .collect();
    let n = requests.len();
    let orders: [Vec<usize>; 3] = [
        (0..n).collect(),
        (0..n).rev().collect(),
        // Neighbours are of different tenants.
        (0..n).map(|i| i * 4 % n).collect(),
    ];
    for order in orders {
        for batch_size in [8, 3, n] {
            let ordered: Vec<Request<'_>> = order.iter().map(|i| requests[*i].clone()).collect();
            let mixed = generate(model, &ordered, batch_size, |_| {}).unwrap().completions;
            for (i, got) in order.iter().zip(mixed) {
                assert_eq!(got, alone[*i], "{:?} in {order:?} by {batch_size}", ASKED[*i]);
            }
        }
    }
    alone
}

#[test]
fn greedy_answers_do_not_depend_on_the_batch() {
    let answers = check_batches(&requests(|_| SamplingParams::GREEDY));
    // Tenants do answer differently, and as they were trained to.
    assert_eq!(answers[1].text.trim(), "77 + 4 = 81");
    assert_eq!(answers[4].text.trim(), "s-a-d-d-l-e");
    assert_ne!(answers[4].tokens, answers[5].tokens);
}

#[test]
fn sampled_answers_do_not_depend_on_the_batch() {
    let warm = |i: usize| SamplingParams {
        temperature: 0.9,
        top_k: if i.is_multiple_of(2) { 40 } else { 0 },
        top_p: if i.is_multiple_of(3) { 0.95 } else { 1.0 },
        seed: i as u64 / 2,
    };
    let sampled = check_batches(&requests(warm));
    let greedy = requests(|_| SamplingParams::GREEDY);
    let greedy = generate(&FAMILY.model, &greedy, 32, |_| {}).unwrap().completions;
    let same = sampled.iter().zip(&greedy).filter(|(a, b)| a == b).count();
    assert!(same < sampled.len() / 2, "{same} of {} drew the likeliest", sampled.len());
}

#[test]
fn logits_in_a_mixed_batch_are_those_alone() {
    let family = &*FAMILY;
    let prompts = prompts();
    let alone: Vec<Vec<f32>> = prompts
        .iter()
        .zip(ASKED)
        .map(|(prompt, (name, _))| logits(&family.model, family.tenant(name), prompt))
        .collect();
    // The same prompt of the same fine-tune under another codec.
    assert!(alone[1] != alone[2] && alone[3] != alone[4]);
    // Some sequences in one piece, some in several, which join later ones.
    let mut noise = Noise(11);
    let mut caches: Vec<KvCache> =
        prompts.iter().map(|_| KvCache::new(family.model.config())).collect();
    let mut got = vec![Vec::new(); prompts.len()];
    let mut n_steps = 0;
    while caches.iter().zip(&prompts).any(|(c, p)| c.n_tokens() < p.len()) {
        let mut segments = Vec::new();
        for (i, cache) in caches.iter_mut().enumerate() {
            let rest = &prompts[i][cache.n_tokens()..];
            let draw = noise.next();
            let n = match n_steps {
                0 if draw < 0.3 => rest.len(),
                _ => rest.len().min((draw * 12.0).max(0.0) as usize),
            };
            if n > 0 {
                let tenant = family.tenant(ASKED[i].0);
                let tokens = &rest[..n];
                segments.push((i, Segment { tokens, tenant, cache, logits: Logits::All }));
            }
        }
        let (indexes, mut segments): (Vec<usize>, Vec<_>) = segments.into_iter().unzip();
        let logits = family.model.forward(&mut segments).unwrap();
        for (i, logits) in indexes.into_iter().zip(logits) {
            got[i].extend(logits);
        }
        n_steps += 1;
    }
    assert!(n_steps > 3, "{n_steps}");
    for (i, (got, alone)) in got.iter().zip(&alone).enumerate() {
        assert!(got == alone, "{:?}", ASKED[i]);
    }
}

#[test]
fn only_the_logits_asked_for_are_computed() {
    let family = &*FAMILY;
    let prompts = prompts();
    let kinds = [Logits::None, Logits::Last, Logits::All];
    let mut caches: Vec<KvCache> =
        prompts.iter().map(|_| KvCache::new(family.model.config())).collect();
    let mut segments: Vec<Segment<'_>> = caches
        .iter_mut()
        .enumerate()
        .map(|(i, cache)| {
            let tenant = family.tenant(ASKED[i].0);
            Segment { tokens: &prompts[i], tenant, cache, logits: kinds[i % 3] }
        })
        .collect();
    let got = family.model.forward(&mut segments).unwrap();
    for (i, got) in got.iter().enumerate() {
        let all = logits(&family.model, family.tenant(ASKED[i].0), &prompts[i]);
        let vocab_size = family.model.config().vocab_size;
        match kinds[i % 3] {
            Logits::None => assert!(got.is_empty()),
            Logits::Last => assert!(got[..] == all[all.len() - vocab_size..], "{i}"),
            Logits::All => assert!(*got == all, "{i}"),
        }
    }
}

#[test]
fn a_segment_without_tokens_changes_nothing() {
    let family = &*FAMILY;
    let tokens = &prompts()[1][..];
    let tenant = family.tenant("math rtn");
    let alone = logits(&family.model, tenant, tokens);
    let mut caches = [(); 3].map(|()| KvCache::new(family.model.config()));
    let mut segments: Vec<_> = caches
        .iter_mut()
        .zip([&[], tokens, &[]])
        .map(|(cache, tokens)| Segment { tokens, tenant, cache, logits: Logits::All })
        .collect();
    let got = family.model.forward(&mut segments).unwrap();
    assert!(got[0].is_empty() && got[1] == alone && got[2].is_empty());
    // Nor does a batch of nothing else.
    let mut none: Vec<_> = caches
        .iter_mut()
        .map(|cache| Segment { tokens: &[], tenant: None, cache, logits: Logits::Last })
        .collect();
    assert_eq!(family.model.forward(&mut none).unwrap(), vec![Vec::<f32>::new(); 3]);
    assert_eq!(family.model.forward(&mut []).unwrap(), Vec::<Vec<f32>>::new());
    assert_eq!(caches.map(|c| c.n_tokens()), [0, tokens.len(), 0]);
}

#[test]
fn a_dense_tenant_answers_as_its_fine_tune() {
    let family = &*FAMILY;
    for (name, fine_tune) in
        [("math dense", "math"), ("chat dense", "chat"), ("chat dense exact", "chat")]
    {
        let own = Model::load(Checkpoint::open(&demo(fine_tune)).unwrap()).unwrap();
        let mut requests = Vec::new();
        for prompt in prompts() {
            let want = logits(&own, None, &prompt);
            let got = logits(&family.model, family.tenant(name), &prompt);
            let error = difference(&got, &want);
            assert!(error <= 1e-5, "{name}: {error:e}");
            // What is far from the base is near the fine-tune.
            assert!(difference(&logits(&family.model, None, &prompt), &want) > 1e-2, "{name}");
            requests.push(Request {
                tenant: None,
                prompt,
                max_new_tokens: 12,
                sampling: SamplingParams::GREEDY,
                stop_tokens: &family.text.stop_tokens,
                stop_texts: &[],
                tokenizer: None,
            });
        }
        let want = generate(&own, &requests, 8, |_| {}).unwrap().completions;
        requests.iter_mut().for_each(|r| r.tenant = family.tenant(name));
        let got = generate(&family.model, &requests, 8, |_| {}).unwrap().completions;
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn a_tenant_holds_its_parts_and_no_more() {
    let family = &*FAMILY;
    let bytes = |name: &str| family.tenant(name).unwrap().resident_bytes();
    let weights = usize::try_from(family.model.checkpoint().size_bytes()).unwrap();
    assert!(bytes("math sign") < weights / 10, "{}", bytes("math sign"));
    assert!(bytes("math rtn") < weights / 3, "{}", bytes("math rtn"));
    // Deltas in f32 of weights in bf16.
    assert!((2 * weights - weights / 50..=2 * weights).contains(&bytes("math dense")));
    assert!(bytes("chat dense exact") < bytes("chat dense"));
}
