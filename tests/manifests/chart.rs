//! The chart, rendered with the part of Helm's functions that it uses.
use std::{collections::BTreeSet, env, fs, path::PathBuf};

use gtmpl::{Context, FuncError, Template, Value as Tv};
use serde_json::{Value, json};

/// The documents of `weft.yaml`, by their templates in this order.
const TEMPLATES: [&str; 4] = ["rbac", "shared", "daemonset", "monitoring"];

#[test]
fn weft_yaml_is_the_chart_with_its_defaults() {
    let rendered = render(values());
    let file = deploy("weft.yaml");
    if env::var_os("INSTA_UPDATE").is_some_and(|value| value == "always") {
        fs::write(&file, &rendered).unwrap();
    }
    let committed = fs::read_to_string(&file).unwrap();
    assert!(
        committed == rendered,
        "INSTA_UPDATE=always cargo test -p weft-lab --test manifests rewrites weft.yaml"
    );
}

#[test]
fn every_value_is_in_the_schema_and_has_a_default() {
    let schema: Value = serde_json::from_str(&text("helm/weft/values.schema.json")).unwrap();
    let names = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let mut known = names(&schema["properties"]);
    // Helm's own, for charts of charts.
    known.remove("global");
    assert_eq!(known, names(&values()));
    for (name, part) in schema["properties"].as_object().unwrap() {
        let part = if part["$ref"].is_string() { &schema["definitions"]["monitor"] } else { part };
        if part["additionalProperties"] == json!(false) {
            assert_eq!(names(&part["properties"]), names(&values()[name]), "{name}");
        }
    }
}

/// The chart's text with these values.
pub fn render(values: Value) -> String {
    let chart: Value = yaml(&text("helm/weft/Chart.yaml"));
    let context = json!({
        "Values": values,
        "Release": { "Namespace": "kube-system", "Name": "weft" },
        "Chart": { "AppVersion": chart["appVersion"], "Name": chart["name"] },
    });
    let render = |name: &&str| {
        let mut template = Template::default();
        template.add_func("toYaml", to_yaml);
        template.add_func("indent", indent);
        template.add_func("default", default);
        template.add_func("quote", quote);
        template.parse(text(&format!("helm/weft/templates/{name}.yaml"))).unwrap();
        template.render(&Context::from(value(&context))).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let documents = TEMPLATES.iter().map(render).map(|document| document.trim().to_string());
    let documents: Vec<_> = documents.filter(|document| !document.is_empty()).collect();
    format!("{HEADER}{}\n", documents.join("\n---\n"))
}

/// The chart's defaults.
pub fn values() -> Value {
    yaml(&text("helm/weft/values.yaml"))
}

/// The documents of a YAML file.
pub fn documents(text: &str) -> Vec<Value> {
    let parts = text.split("\n---\n").map(|part| part.trim_end().trim_end_matches("---"));
    parts.map(yaml::<Value>).filter(|document| !document.is_null()).collect()
}

pub fn text(file: &str) -> String {
    let path = deploy(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml<T: serde::de::DeserializeOwned>(text: &str) -> T {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn deploy(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file)
}

fn value(json: &Value) -> Tv {
    match json {
        Value::Null => Tv::Nil,
        Value::Bool(flag) => (*flag).into(),
        Value::Number(number) => number.as_i64().expect("the values' numbers are whole").into(),
        Value::String(text) => text.clone().into(),
        Value::Array(list) => Tv::Array(list.iter().map(value).collect()),
        Value::Object(object) => Tv::Map(object.iter().map(|(k, v)| (k.clone(), value(v))).collect()),
    }
}

/// As Helm writes it: keys in order, lists not indented.
fn to_yaml(arguments: &[Tv]) -> Result<Tv, FuncError> {
    let mut lines = Vec::new();
    write(&arguments[0], "", &mut lines);
    Ok(lines.join("\n").into())
}

fn write(value: &Tv, indent: &str, lines: &mut Vec<String>) {
    match value {
        Tv::Map(map) | Tv::Object(map) if !map.is_empty() => {
            let sorted: std::collections::BTreeMap<_, _> = map.iter().collect();
            for (key, value) in sorted {
                match scalar(value) {
                    Some(text) => lines.push(format!("{indent}{key}: {text}")),
                    None => {
                        lines.push(format!("{indent}{key}:"));
                        let deeper = if matches!(value, Tv::Array(_)) { "" } else { "  " };
                        write(value, &format!("{indent}{deeper}"), lines);
                    }
                }
            }
        }
        Tv::Array(list) if !list.is_empty() => {
            for item in list {
                let at = lines.len();
                write(item, &format!("{indent}  "), lines);
                lines[at].replace_range(indent.len()..indent.len() + 2, "- ");
            }
        }
        other => lines.push(format!("{indent}{}", scalar(other).expect("neither map nor list"))),
    }
}

fn scalar(value: &Tv) -> Option<String> {
    match value {
        Tv::Map(map) | Tv::Object(map) => map.is_empty().then(|| "{}".into()),
        Tv::Array(list) => list.is_empty().then(|| "[]".into()),
        Tv::Nil | Tv::NoValue => Some("null".into()),
        // Unless it would be read as something else.
        Tv::String(text) if yaml::<Value>(text) != text.as_str() => {
            Some(Value::from(text.as_str()).to_string())
        }
        other => Some(other.to_string()),
    }
}

fn indent(arguments: &[Tv]) -> Result<Tv, FuncError> {
    let [Tv::Number(width), text] = arguments else {
        return Err(FuncError::AtLeastXArgs("indent".into(), 2));
    };
    let spaces = " ".repeat(width.as_u64().unwrap_or(0) as usize);
    let lines: Vec<_> = text.to_string().lines().map(|line| format!("{spaces}{line}")).collect();
    Ok(lines.join("\n").into())
}

fn default(arguments: &[Tv]) -> Result<Tv, FuncError> {
    let [fallback, given] = arguments else { return Err(FuncError::ExactlyXArgs("default".into(), 2)) };
    let is_empty = matches!(given, Tv::Nil | Tv::NoValue) || given.to_string().is_empty();
    Ok(if is_empty { fallback.clone() } else { given.clone() })
}

fn quote(arguments: &[Tv]) -> Result<Tv, FuncError> {
    Ok(Value::from(arguments[0].to_string()).to_string().into())
}

const HEADER: &str = "\
# Weft on Kubernetes: kubectl apply -f weft.yaml
#
# This is the chart in helm/weft with its defaults; change that, or build on it with kustomize.
";
