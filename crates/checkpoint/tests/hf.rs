//! Export to the Hugging Face layout, and what is read back and refused.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use drumline_checkpoint::{CheckpointError, ModelSource, WriterOptions, hf, open_model};
use drumline_mesh::ShardSpec;
use drumline_spec::{Family, ModelConfig};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use support::{model, options, values, write};

const TOKENIZER: &str =
    r#"{"added_tokens": [{"id": 3, "content": "<|endoftext|>", "special": true}]}"#;

/// A checkpoint of two ranks with optimizer state, exported.
fn exported(folder: &Path, model: &ModelConfig) -> (ModelSource, PathBuf) {
    let tokenizer = folder.join("t.json");
    fs::write(&tokenizer, TOKENIZER).unwrap();
    let mut tensors = hf::weights(model);
    for (name, shape) in tensors.clone() {
        tensors.push((format!("adam.m/{name}"), shape));
    }
    let run = folder.join("run");
    write(&tensors, (2, 2), 2, 5, |rank| WriterOptions {
        model: model.clone(),
        tokenizer: Some(tokenizer.clone()),
        ..options(&run, rank, 2)
    });
    let source = open_model(&run).unwrap();
    let out = folder.join("hf");
    hf::export(&source, &out).unwrap();
    (source, out)
}

fn whole(name: &str, shape: &[usize]) -> ShardSpec {
    ShardSpec {
        name: name.into(),
        global_shape: shape.into(),
        offset: vec![0; shape.len()],
        shape: shape.into(),
    }
}

#[test]
fn what_is_exported_reads_back_with_the_same_values() {
    for family in [Family::Llama, Family::Gpt2] {
        let folder = tempfile::tempdir().unwrap();
        let model = model(family);
        let (_, out) = exported(folder.path(), &model);
        let back = open_model(&out).unwrap();
        assert_eq!(back.model, model);
        assert_eq!(back.tokenizer.as_deref(), Some(&*out.join("tokenizer.json")));
        assert_eq!(back.step, None);
        let names: Vec<_> = back.reader.tensors().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(names.len(), hf::weights(&model).len(), "no optimizer: {names:?}");
        for (name, shape) in hf::weights(&model) {
            let got = back.reader.read_whole(&name).unwrap();
            assert_eq!(got, values(&whole(&name, &shape), 5), "{name}");
        }
        let json = |file: &str| -> serde_json::Value {
            serde_json::from_slice(&fs::read(out.join(file)).unwrap()).unwrap()
        };
        assert_eq!(json("config.json")["eos_token_id"], 3);
        assert_eq!(json("generation_config.json")["eos_token_id"], 3);
        assert_eq!(json("tokenizer_config.json")["eos_token"], "<|endoftext|>");
    }
}

#[test]
fn a_checkpoint_that_is_not_of_its_model_is_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let (mut source, _) = exported(folder.path(), &model(Family::Llama));
    source.model.layers = 3;
    let error = hf::export(&source, &folder.path().join("out")).unwrap_err().to_string();
    assert!(error.contains("model.layers.2."), "{error}");
    source.model.layers = 2;
    source.model.ffn = 41;
    let error = hf::export(&source, &folder.path().join("out")).unwrap_err().to_string();
    assert!(error.contains("mlp.") && error.contains("41"), "{error}");
    assert!(!folder.path().join("out").exists());
}

/// Rewrites the exported weights as another program might: two files with an index, half of the
/// tensors in bf16 and half in f16, and a buffer that is not a weight.
#[test]
fn halves_in_two_files_with_an_index_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(Family::Llama);
    let (_, out) = exported(folder.path(), &model);
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let mut halves: Vec<(String, Vec<usize>, Dtype, Vec<u8>)> = Vec::new();
    for (i, (name, view)) in all.iter().enumerate() {
        let floats = view.data().chunks_exact(4);
        let floats = floats.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let (dtype, data) = if i % 2 == 0 {
            let bits = floats.flat_map(|x| half::bf16::from_f32(x).to_le_bytes());
            (Dtype::BF16, bits.collect())
        } else {
            (Dtype::F16, floats.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect())
        };
        halves.push((name.to_owned(), view.shape().to_vec(), dtype, data));
    }
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned();
    halves.push((buffer, vec![2], Dtype::I64, vec![0; 16]));
    let mut map = serde_json::Map::new();
    for (i, part) in halves.chunks(halves.len().div_ceil(2)).enumerate() {
        let file = format!("model-{i}.safetensors");
        let views = part.iter().map(|(name, shape, dtype, data)| {
            map.insert(name.clone(), file.clone().into());
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
        fs::write(out.join(&file), bytes).unwrap();
    }
    fs::remove_file(out.join("model.safetensors")).unwrap();
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(out.join("model.safetensors.index.json"), index.to_string()).unwrap();

    let back = open_model(&out).unwrap();
    for (name, shape) in hf::weights(&model) {
        let got = back.reader.read_whole(&name).unwrap();
        let expected = values(&whole(&name, &shape), 5);
        for (got, expected) in got.iter().zip(&expected) {
            // bf16 keeps 8 bits of the mantissa.
            assert!((got - expected).abs() <= expected.abs() / 256.0, "{name}: {got} {expected}");
        }
    }
}

#[test]
fn the_first_gpt2_files_lack_the_heads_prefix() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(Family::Gpt2);
    let (_, out) = exported(folder.path(), &model);
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let mask = [0u8; 16];
    let mut bare: Vec<_> = all
        .iter()
        .map(|(name, view)| (name.strip_prefix("transformer.").unwrap().to_owned(), view))
        .collect();
    let view = TensorView::new(Dtype::F32, vec![2, 2], &mask).unwrap();
    bare.push(("h.0.attn.bias".into(), view.clone()));
    // The copy of a tied head.
    bare.push(("lm_head.weight".into(), view));
    fs::write(out.join("model.safetensors"), safetensors::serialize(bare, None).unwrap()).unwrap();
    let back = open_model(&out).unwrap();
    let name = "transformer.h.1.attn.c_attn.bias";
    assert_eq!(back.reader.read_whole(name).unwrap(), values(&whole(name, &[48]), 5));
}

#[test]
fn what_is_missing_or_broken_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (_, out) = exported(folder.path(), &model(Family::Llama));
    let weights = out.join("model.safetensors");
    let good = fs::read(&weights).unwrap();
    let refused = |expected: &str| {
        let error = open_model(&out).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    fs::write(&weights, &good[..good.len() - 1]).unwrap();
    refused("model.safetensors");
    fs::write(&weights, "x").unwrap();
    refused("too short");
    fs::write(&weights, [0xFF; 64]).unwrap();
    refused("not a safetensors file");
    let all = SafeTensors::deserialize(&good).unwrap();
    let fewer = all.iter().filter(|(name, _)| *name != "model.norm.weight");
    let fewer = safetensors::serialize(fewer.collect::<Vec<_>>(), None).unwrap();
    fs::write(&weights, fewer).unwrap();
    refused("tensor model.norm.weight");
    fs::remove_file(&weights).unwrap();
    refused("model.safetensors");
    let index = serde_json::json!({"weight_map": {"a": "../../elsewhere.safetensors"}});
    fs::write(out.join("model.safetensors.index.json"), index.to_string()).unwrap();
    refused("not in the folder");
    fs::write(out.join("config.json"), r#"{"architectures": ["BertModel"]}"#).unwrap();
    let error = open_model(&out).unwrap_err();
    assert!(matches!(error, CheckpointError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("BertModel"), "{error}");
}
