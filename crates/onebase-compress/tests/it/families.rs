//! Families: what relatives share, and that nothing else changes by it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::support::{Memory, Noise, SAME, demo, difference, logits};
use onebase_codec::CodecSpec;
use onebase_codec::rqt::Rqt;
use onebase_compress::{
    Budget, Error, FamilyOptions, FamilyPlans, Member, Relatives, Silent, TablePlan, VectorPlan,
    add_to_family, build_family, family_report, open_members, rebuild_family, restore, verify,
    verify_family,
};
use onebase_format::artifact::{Artifact, MANIFEST_FILE, Storage};
use onebase_format::family::{FAMILY_FILE, Family};
use onebase_format::{Checkpoint, Error as FormatError};
use onebase_model::{KvCache, Logits, Model, Segment, Tenant, resident_bytes_of};
use serde_json::Value;

/// A base, two fine-tunes of which one was trained on from the other, and a stranger.
struct Place {
    dir: tempfile::TempDir,
}

const BUDGET: Budget = Budget::BitsPerWeight(4.5);

impl Place {
    fn new(kind: &str) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        let base = Memory::fixture(kind);
        let first = base.tuned(1);
        let mut later = first.clone();
        let mut noise = Noise(2);
        for (name, tensor) in &mut later.tensors {
            if name != SAME {
                let values = tensor.widen();
                let values: Vec<f32> = values.iter().map(|w| w + 0.005 * noise.next()).collect();
                tensor.fill(&values);
            }
        }
        base.write(&place.path("base"));
        first.write(&place.path("first"));
        later.write(&place.path("later"));
        base.tuned(3).write(&place.path("other"));
        place
    }

    /// The demo's fine-tunes, and one trained on from the first as it were.
    fn demo() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        let [base, first, other] = ["base", "math", "chat"].map(|name| Memory::read(&demo(name)));
        let mut later = first.clone();
        let mut noise = Noise(4);
        for (name, tensor) in &mut later.tensors {
            let (base, first) = (base.tensors[name].widen(), first.tensors[name].widen());
            let deltas = base.iter().zip(&first).map(|(b, w)| (w - b) * (w - b));
            let scale = (deltas.sum::<f32>() / base.len() as f32).sqrt();
            let pairs = base.iter().zip(&first);
            let values: Vec<f32> =
                pairs.map(|(b, w)| b + 1.1 * (w - b) + 0.4 * scale * noise.next()).collect();
            tensor.fill(&values);
        }
        for (name, memory) in [("base", base), ("first", first), ("other", other), ("later", later)]
        {
            memory.write(&place.path(name));
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_members(&self, names: &[&str]) -> Result<Vec<Member>, Error> {
        let named: Vec<(String, PathBuf)> =
            names.iter().map(|name| ((*name).to_owned(), self.path(name))).collect();
        open_members(&self.path("base"), &named)
    }

    fn members(&self, names: &[&str]) -> Vec<Member> {
        self.try_members(names).unwrap()
    }

    fn try_build(
        &self,
        names: &[&str],
        options: &FamilyOptions,
        budget: Budget,
    ) -> Result<Family, Error> {
        let members = self.members(names);
        let relatives = Relatives::measure(&members, &Silent)?;
        let plans = FamilyPlans::within(&members, &relatives, options, budget)?;
        let target = self.path("family");
        build_family(&members, &relatives, &plans.shared, &target, &Silent)?;
        Ok(Family::open(&target)?)
    }

    fn build(&self, names: &[&str]) -> Family {
        self.try_build(names, &options("rqt:group_size=32"), BUDGET).unwrap()
    }

    fn base(&self) -> Checkpoint {
        Checkpoint::open(&self.path("base")).unwrap()
    }

    fn add(&self, family: &Family, name: &str) -> Result<onebase_compress::Added, Error> {
        let members = self.members(&[name]);
        add_to_family(family, &members[0], None, &tables(), &VectorPlan::Exact, &Silent)
    }
}

fn tables() -> TablePlan {
    "rtn:bits=8".parse().unwrap()
}

fn options(rqt: &str) -> FamilyOptions {
    let rqt = rqt.parse::<Rqt>().unwrap();
    FamilyOptions { rqt, leaf: None, tables: tables(), vectors: VectorPlan::Exact }
}

/// Every file below a folder.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.file_name().unwrap() != ".lock" {
                let name = path.strip_prefix(dir).unwrap().to_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// The least error of each tenant, which is that at the end of its path.
fn errors(family: &Family) -> BTreeMap<String, f64> {
    let mut errors = BTreeMap::new();
    for (name, error) in family.manifest().nodes.values().flat_map(|node| &node.errors) {
        let least = errors.entry(name.clone()).or_insert(f64::INFINITY);
        *least = least.min(*error);
    }
    errors
}

#[test]
fn relatives_share_and_a_stranger_is_as_alone() {
    let names = ["first", "other", "later"];
    let place = Place::demo();
    let budget = Budget::BitsPerWeight(2.2);
    let shared = place.try_build(&names, &options("rqt"), budget).unwrap();
    let report = family_report(&shared, Some(16.0)).unwrap();
    assert!(report.nodes[0].tenants == ["first", "later"], "{:?}", report.nodes[0]);
    assert!(report.nodes[1..].iter().all(|node| node.tenants.len() == 1));
    // All bytes are counted, and those of linear sites are within the budget.
    let on_disk: usize = contents(shared.dir()).values().map(Vec::len).sum();
    assert_eq!(report.total_bytes, on_disk as u64);
    assert!(report.amortised_bpw <= 2.2, "{}", report.amortised_bpw);
    let base = report.amortised_bpw_with_base.unwrap();
    assert!((base - report.amortised_bpw - 16.0 / 3.0).abs() < 1e-9);
    // Tenants' parts are the whole, and what only one has is a part of its own.
    let sum: f64 = report.tenants.iter().map(|tenant| tenant.attributed_bpw).sum();
    assert!((sum / 3.0 / report.amortised_bpw - 1.0).abs() < 1e-9);
    for tenant in &report.tenants {
        assert!(tenant.marginal_bpw <= tenant.attributed_bpw + 1e-9);
        assert!(tenant.attributed_bpw <= tenant.path_bpw + 1e-9);
    }
    let verified = verify_family(&place.base(), &shared, &Silent).unwrap();
    assert_eq!(verified.len(), 3);
    let with = errors(&shared);

    std::fs::rename(shared.dir(), place.path("shared")).unwrap();
    let alone = place.try_build(&names, &options("rqt:topology=flat"), budget).unwrap();
    let without = errors(&alone);
    assert!((with["other"] / without["other"] - 1.0).abs() < 1e-9);
    for name in ["first", "later"] {
        assert!(with[name] < 0.5 * without[name], "{name}: {with:?}, {without:?}");
    }
}

#[test]
fn a_site_that_is_the_bases_stays_so() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "later"]);
    let tenant = family.tenant("first").unwrap();
    assert_eq!(tenant.record(SAME).unwrap().storage, Storage::Unchanged);
    assert!(matches!(
        tenant.record("model.layers.1.self_attn.o_proj.weight").unwrap().storage,
        Storage::Path { .. }
    ));
    assert!(tenant.path(SAME).unwrap().is_none());
}

/// Tenants of a family next to each other, in pieces and at once: what is shared is computed
/// once, and gives to the bit what each gets alone.
#[test]
fn a_batch_over_the_family_is_each_alone() {
    let place = Place::new("qwen2_tied");
    let family = place.build(&["first", "other", "later"]);
    let model = Model::load(place.base()).unwrap();
    let names = ["first", "later", "other", "first", "later"];
    let load = |name: &&str| Tenant::load(&model, &family.tenant(name).unwrap()).unwrap();
    let tenants: Vec<Tenant> = names[..3].iter().map(load).collect();
    let of = |i: usize| &tenants[i % 3];
    // Nodes are in memory once.
    let each: usize = tenants.iter().map(Tenant::resident_bytes).sum();
    let together = resident_bytes_of(tenants.iter());
    let shared: usize = family_report(&family, None)
        .unwrap()
        .nodes
        .iter()
        .map(|node| (node.tenants.len() - 1) * usize::try_from(node.bytes).unwrap())
        .sum();
    assert!(shared > 0 && together < each);
    // But for the headers of their files.
    assert!((each - together).abs_diff(shared) < shared / 3, "{each} {together} {shared}");
    let prompts: Vec<Vec<u32>> =
        (0..names.len() as u32).map(|i| (0..5 + i).map(|t| (7 * t + i) % 50).collect()).collect();
    let alone: Vec<Vec<f32>> =
        prompts.iter().enumerate().map(|(i, p)| logits(&model, Some(of(i)), p)).collect();
    assert!(alone[0][..50] != alone[1][..50] && alone[1][..50] != alone[2][..50]);
    for piece in [1, 3, 100] {
        let mut caches: Vec<KvCache> =
            prompts.iter().map(|_| KvCache::new(model.config())).collect();
        let mut got = vec![Vec::new(); prompts.len()];
        while caches.iter().zip(&prompts).any(|(c, p)| c.n_tokens() < p.len()) {
            let mut order = Vec::new();
            let mut segments = Vec::new();
            for (i, cache) in caches.iter_mut().enumerate().rev() {
                let rest = &prompts[i][cache.n_tokens()..];
                let tokens = &rest[..rest.len().min(piece)];
                if !tokens.is_empty() {
                    order.push(i);
                    let tenant = Some(of(i));
                    segments.push(Segment { tokens, tenant, cache, logits: Logits::All });
                }
            }
            let logits = model.forward(&mut segments).unwrap();
            order.into_iter().zip(logits).for_each(|(i, logits)| got[i].extend(logits));
        }
        assert!(got == alone, "pieces of {piece}");
    }
}

/// What is served, what is restored and what a wrapped delta gives are the same weights.
#[test]
fn a_tenant_is_served_as_it_is_restored() {
    let place = Place::new("llama_bias");
    let family = place.build(&["first", "other", "later"]);
    let model = Model::load(place.base()).unwrap();
    for name in ["later", "other"] {
        let artifact = family.tenant(name).unwrap();
        let target = place.path(&format!("{name} restored"));
        restore(&place.base(), &artifact, &target, &Silent).unwrap();
        let restored = Model::load(Checkpoint::open(&target).unwrap()).unwrap();
        let tokens: Vec<u32> = (0..20).map(|t| 3 * t % 50).collect();
        let want = logits(&restored, None, &tokens);
        let served = Tenant::load(&model, &artifact).unwrap();
        assert!(difference(&logits(&model, Some(&served), &tokens), &want) < 1e-3, "{name}");
        let wrapped = Tenant::load_with(&model, &artifact, &mut |_, delta| delta).unwrap();
        assert!(logits(&model, Some(&wrapped), &tokens) == logits(&model, Some(&served), &tokens));
    }
}

#[test]
fn adding_and_removing_touch_nobody_else() {
    let place = Place::demo();
    let budget = Budget::BitsPerWeight(2.2);
    let family = place.try_build(&["first", "other"], &options("rqt"), budget).unwrap();
    let before = contents(family.dir());
    let added = place.add(&family, "later").unwrap();
    assert_eq!(added.nodes.len(), 1, "{added:?}");
    assert!(added.left < 0.2, "its relative's codes hold most of it: {added:?}");
    let after = contents(family.dir());
    for (name, bytes) in before.iter().filter(|(name, _)| *name != Path::new(FAMILY_FILE)) {
        assert!(after[name] == *bytes, "{}", name.display());
    }
    let family = Family::open(family.dir()).unwrap();
    assert_eq!(family.tenants().unwrap(), ["first", "later", "other"]);
    verify_family(&place.base(), &family, &Silent).unwrap();
    let report = family_report(&family, None).unwrap();
    let [first, later, _] = &report.tenants[..] else { panic!("three tenants") };
    // As good as the others for less.
    assert!(later.marginal_bpw < 0.7 * first.path_bpw, "{report:?}");
    let all = errors(&family);
    assert!(all["later"] < 1.1 * f64::midpoint(all["first"], all["other"]), "{all:?}");

    assert!(matches!(place.add(&family, "later"), Err(Error::TwoTenants { .. })));
    // Whose codes another has on its path may go, the codes stay.
    assert!(family.change().unwrap().remove_tenant("first").unwrap().is_empty());
    verify(&place.base(), &family.tenant("later").unwrap(), &Silent).unwrap();
    let gone = family.change().unwrap().remove_tenant("later").unwrap();
    assert_eq!(gone.len(), 2);
    let left = contents(family.dir());
    for (name, bytes) in left.iter().filter(|(name, _)| *name != Path::new(FAMILY_FILE)) {
        assert!(before[name] == *bytes, "{}", name.display());
    }
    family.change().unwrap().remove_tenant("other").unwrap();
    assert!(family.tenants().unwrap().is_empty());
    place.add(&family, "other").unwrap();
    family.change().unwrap().remove_tenant("other").unwrap();
    let base = Memory::read(&place.path("base"));
    base.tuned(8).write(&place.path("base"));
    assert!(matches!(place.add(&family, "other"), Err(Error::OtherFamilyBase { .. })));
    base.write(&place.path("base"));
    place.add(&family, "other").unwrap();
    let error = family.change().unwrap().remove_tenant("later").unwrap_err();
    let FormatError::NoTenant { got, known, .. } = error else { panic!("{error}") };
    assert_eq!((got.as_str(), &known[..]), ("later", &["other".to_owned()][..]));
}

#[test]
fn another_base_is_refused() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "other"]);
    let before = contents(family.dir());
    Memory::read(&place.path("base")).tuned(8).write(&place.path("base"));
    let error = place.add(&family, "later").unwrap_err();
    assert!(matches!(error, Error::Format(FormatError::OtherBase { .. })), "{error}");
    assert!(contents(family.dir()) == before);
    assert!(verify_family(&place.base(), &family, &Silent).is_err());
}

#[test]
fn a_family_is_rebuilt_from_its_originals_alone() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "other"]);
    place.add(&family, "later").unwrap();
    let options = options("rqt:group_size=32");
    let rebuild = |names: &[&str]| {
        let members = place.members(names);
        let relatives = Relatives::measure(&members, &Silent).unwrap();
        let plans = FamilyPlans::within(&members, &relatives, &options, BUDGET).unwrap();
        rebuild_family(&family, &members, &relatives, &plans.shared, &Silent)
    };
    let before = contents(family.dir());
    let error = rebuild(&["first", "other"]).unwrap_err();
    assert!(matches!(&error, Error::OtherOriginal { name, got: None, .. } if name == "later"));
    let original = Memory::read(&place.path("later"));
    original.tuned(5).write(&place.path("later"));
    let error = rebuild(&["first", "other", "later"]).unwrap_err();
    assert!(matches!(&error, Error::OtherOriginal { name, got: Some(_), .. } if name == "later"));
    assert!(contents(family.dir()) == before);
    original.write(&place.path("later"));
    rebuild(&["first", "other", "later"]).unwrap();
    // As if it had been built at once.
    let rebuilt = contents(family.dir());
    std::fs::rename(family.dir(), place.path("rebuilt")).unwrap();
    let anew = place.build(&["first", "other", "later"]);
    assert!(contents(anew.dir()) == rebuilt);
}

/// A process that is killed while it puts a tenant in the place of another leaves one of them.
#[test]
fn what_an_interrupted_change_has_left_is_put_right() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "other"]);
    let before = contents(family.dir());
    let tenants = family.dir().join("tenants");
    std::fs::rename(tenants.join("first"), tenants.join(".first.replaced")).unwrap();
    std::fs::create_dir(tenants.join(".other.removed")).unwrap();
    std::fs::write(family.dir().join("nodes/.0.partial"), b"half").unwrap();
    drop(family.change().unwrap());
    assert!(contents(family.dir()) == before);
    std::fs::create_dir(tenants.join(".first.replaced")).unwrap();
    drop(family.change().unwrap());
    assert!(contents(family.dir()) == before && !tenants.join(".first.replaced").exists());
    let busy = family.change().unwrap();
    assert!(matches!(family.change(), Err(FormatError::Busy { .. })));
    drop(busy);
    assert!(matches!(family.tenant_folder(".hidden"), Err(FormatError::UnsafeName { .. })));
    assert!(matches!(family.tenant("../tenants"), Err(FormatError::UnsafeName { .. })));
}

#[test]
fn a_missing_or_altered_node_is_said_with_whom_it_affects() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "other", "later"]);
    let report = family_report(&family, None).unwrap();
    let node = family.node_path(report.nodes[0].blake3);
    let good = std::fs::read(&node).unwrap();
    let affected = |error: FormatError, what: &str| {
        let FormatError::Node { tenants, problem, .. } = &error else { panic!("{error}") };
        assert_eq!(tenants, &["first", "later"]);
        assert!(problem.contains(what), "{problem}");
        assert!(error.hint().unwrap().contains("rebuild"));
    };
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    std::fs::write(&node, &flipped).unwrap();
    affected(family.tenant("later").unwrap().check_files().unwrap_err(), "digest");
    std::fs::write(&node, &good[1..]).unwrap();
    affected(family.tenant("later").unwrap_err(), "bytes");
    std::fs::remove_file(&node).unwrap();
    affected(family.tenant("first").unwrap_err(), "missing");
    verify(&place.base(), &family.tenant("other").unwrap(), &Silent).unwrap();
    // Nor is anything removed or added while codes are missing.
    assert!(place.add(&family, "first").is_err());
    std::fs::write(&node, &good).unwrap();
    verify_family(&place.base(), &family, &Silent).unwrap();
}

#[test]
fn what_is_no_family_is_refused() {
    let place = Place::new("llama_tied_gqa");
    let twice = place.try_members(&["first", "first"]).unwrap_err();
    assert!(matches!(&twice, Error::TwoTenants { name } if name == "first"), "{twice}");
    let base = place.try_members(&["first", "base"]).unwrap_err();
    assert!(matches!(base, Error::NoChange { .. }), "{base}");
    Memory::fixture("qwen2_tied").write(&place.path("stranger"));
    let shape = place.try_members(&["first", "stranger"]).unwrap_err();
    assert!(shape.to_string().contains("stranger"), "{shape}");
    Memory::read(&place.path("first")).write(&place.path("copy"));
    let same = Relatives::measure(&place.members(&["first", "other", "copy"]), &Silent);
    let same = same.unwrap_err();
    assert!(
        matches!(&same, Error::SameWeights { name, other } if name == "copy" && other == "first"),
        "{same}"
    );
    let mut broken = Memory::read(&place.path("other"));
    broken.tensor(crate::support::UP).set(1, 2, f32::NAN);
    broken.write(&place.path("broken"));
    let nan = Relatives::measure(&place.members(&["first", "broken"]), &Silent).unwrap_err();
    let Error::NotFinite { path, row: 1, column: 2, .. } = nan else { panic!("{nan}") };
    assert!(path.starts_with(place.path("broken")));
    let options = options("rqt:group_size=32");
    let tight = place.try_build(&["first", "later"], &options, Budget::BitsPerWeight(0.5));
    assert!(matches!(tight, Err(Error::OverBudget { .. })));
    assert!(!place.path("family").exists());
}

#[test]
fn a_family_of_one_is_plain_codes() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first"]);
    let report = family_report(&family, None).unwrap();
    assert_eq!(report.nodes.len(), 1);
    let artifact = family.tenant("first").unwrap();
    for tensor in artifact.manifest().tensors.keys() {
        for part in artifact.path(tensor).unwrap().into_iter().flatten() {
            assert!(part.gains.is_none() && part.codec.name == "rtn");
        }
    }
}

#[test]
fn budgets_of_bytes_and_shares_are_kept() {
    let originals = |place: &Place| -> u64 {
        let members = place.members(&["first", "other", "later"]);
        members.iter().map(|member| member.pair.fine_tune().size_bytes()).sum()
    };
    for budget in ["40%", "120kB"] {
        let place = Place::new("llama_tied_gqa");
        let budget: Budget = budget.parse().unwrap();
        let options = options("rqt:group_size=32");
        let family = match place.try_build(&["first", "other", "later"], &options, budget) {
            Ok(family) => family,
            Err(Error::OverBudget { least, .. }) => {
                let least: Budget = least.trim_start_matches("about ").parse().unwrap();
                place.try_build(&["first", "other", "later"], &options, least).unwrap()
            }
            Err(error) => panic!("{error}"),
        };
        let on_disk: usize = contents(family.dir()).values().map(Vec::len).sum();
        if let Budget::Share(share) = budget {
            assert!(on_disk as f64 <= share * originals(&place) as f64, "{on_disk}");
        }
    }
}

#[test]
fn leaves_may_be_of_another_codec() {
    let place = Place::new("llama_tied_gqa");
    let leaf: CodecSpec = "dqrelo:bits=2".parse().unwrap();
    let options = FamilyOptions { leaf: Some(leaf), ..options("rqt:group_size=32") };
    let family = place
        .try_build(&["first", "other", "later"], &options, Budget::BitsPerWeight(9.0))
        .unwrap();
    verify_family(&place.base(), &family, &Silent).unwrap();
    let artifact = family.tenant("later").unwrap();
    let path = artifact.path(crate::support::UP).unwrap().unwrap();
    let names: Vec<&str> = path.iter().map(|part| part.codec.name.as_str()).collect();
    assert_eq!(names.last(), Some(&"dqrelo"));
    assert!(names.contains(&"rtn") && path[0].gains.is_some(), "{names:?}");
    let by_depth = family.manifest().nodes.values();
    let all: Vec<f64> = by_depth.flat_map(|node| node.errors.values().copied()).collect();
    assert!(all.iter().all(|error| (0.0..1.0).contains(error)), "{all:?}");
    let later = place.path("more");
    Memory::read(&place.path("later")).tuned(6).write(&later);
    let members = place.members(&["more"]);
    let leaf: CodecSpec = "dqrelo-plus:bits=3".parse().unwrap();
    let added =
        add_to_family(&family, &members[0], Some(leaf), &tables(), &VectorPlan::Exact, &Silent);
    assert!(added.unwrap().leaf.unwrap().starts_with("dqrelo-plus"));
    let family = Family::open(family.dir()).unwrap();
    verify_family(&place.base(), &family, &Silent).unwrap();
    // What a leaf takes is known of every codec.
    assert!(family.manifest().nodes.values().all(|node| node.bits >= 1.0));
    // One whose size is known only once it is encoded has no place in a file that is begun before.
    let leaf: CodecSpec = "deltamix:bits=1".parse().unwrap();
    let refused = add_to_family(
        &family,
        &members[0],
        Some(leaf.clone()),
        &tables(),
        &VectorPlan::Exact,
        &Silent,
    );
    assert!(matches!(refused, Err(Error::TwoTenants { .. })));
    let named = [("again".to_owned(), later)];
    let members = open_members(&place.path("base"), &named).unwrap();
    let before = contents(family.dir());
    let refused =
        add_to_family(&family, &members[0], Some(leaf), &tables(), &VectorPlan::Exact, &Silent);
    assert!(matches!(refused, Err(Error::UnknownSize { .. })));
    assert!(contents(family.dir()) == before);
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let on = |n: usize| {
        let place = Place::new("qwen3");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let names = ["first", "other", "later"];
        pool.install(|| {
            let family = place.build(&names[..2]);
            place.add(&family, "later").unwrap();
            contents(family.dir())
        })
    };
    assert!(on(1) == on(4));
}

#[test]
fn a_larger_vocabulary_is_the_tenants_own() {
    let place = Place::new("llama_tied_gqa");
    let mut later = Memory::read(&place.path("later"));
    later.extend_vocabulary(3);
    later.write(&place.path("later"));
    let family = place.build(&["first", "later"]);
    verify_family(&place.base(), &family, &Silent).unwrap();
    let rows = family.tenant("later").unwrap().added_rows(crate::support::EMBEDDING).unwrap();
    assert_eq!(rows.unwrap().shape[0], 3);
}

/// What a manifest can say of a path that is not so.
#[test]
fn hostile_paths_are_refused() {
    let place = Place::new("llama_tied_gqa");
    let family = place.build(&["first", "later"]);
    let folder = family.tenant_folder("first").unwrap();
    let path = folder.join(MANIFEST_FILE);
    let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let site = |manifest: &mut Value| manifest["tensors"][crate::support::UP].take();
    type Change = fn(&mut Value);
    let cases: [(&str, Change); 7] = [
        ("names node 9", |record| record["path"][0]["node"] = 9.into()),
        ("names codec 77", |record| record["path"][0]["codec"] = 77.into()),
        ("gains", |record| record["path"][0]["gain"] = false.into()),
        ("in no file", |record| record["file"] = Value::Null),
        ("names file", |record| record["file"] = "rest-00009.safetensors".into()),
        ("expected no path", |record| record["role"] = "embedding".into()),
        ("path of shape", |record| record["shape"] = serde_json::json!([64])),
    ];
    for (problem, change) in cases {
        let mut manifest = good.clone();
        let mut record = site(&mut manifest);
        change(&mut record);
        manifest["tensors"][crate::support::UP] = record;
        std::fs::write(&path, manifest.to_string()).unwrap();
        let error = Artifact::open(&folder).unwrap_err().to_string();
        assert!(error.contains(problem), "{problem}: {error}");
    }
    // A node under a name that is no digest.
    let mut manifest = good.clone();
    manifest["nodes"][0]["blake3"] = "../../../etc/passwd".into();
    std::fs::write(&path, manifest.to_string()).unwrap();
    assert!(matches!(Artifact::open(&folder), Err(FormatError::Json { .. })));
    // Codes of another shape than the site's.
    let mut manifest = good;
    manifest["tensors"][crate::support::UP]["path"][0]["codec"] = 0.into();
    for codec in manifest["codecs"].as_array_mut().unwrap() {
        codec["options"]["bits"] = 7.into();
    }
    std::fs::write(&path, manifest.to_string()).unwrap();
    let model = Model::load(place.base()).unwrap();
    let artifact = Artifact::open(&folder).unwrap();
    assert!(Tenant::load(&model, &artifact).is_err());
}
