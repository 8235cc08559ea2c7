//! Reads the settings, and reports all mistakes at once.
//!
//! Invariant: no value of a secret is in a report.

use std::path::Path;

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Toml},
    value::{Dict, Map, Num, Value},
};

use super::{
    Config, ConfigError,
    show::{Effective, SECRETS},
};

const DEFAULTS: &str = include_str!("../defaults.toml");

/// The variables that are not settings.
const NOT_SETTINGS: [&str; 1] = ["config"];

impl Config {
    /// Reads the settings: `file` over the built-in ones, `variables` (those that begin with
    /// `TIDEGATE_`, and `DATABASE_URL`) over both. Returns the settings and their printed form.
    ///
    /// # Errors
    /// [`ConfigError`] with every mistake that was found.
    pub fn load(
        file: Option<&Path>,
        variables: Vec<(String, String)>,
    ) -> Result<(Self, Effective), ConfigError> {
        let mut mistakes = Vec::new();
        let mut figment = Figment::from(Toml::string(DEFAULTS));
        let defaults: Dict = figment.extract().unwrap_or_default();
        if let Some(file) = file {
            figment = figment.merge(Toml::file_exact(file));
        }
        figment = figment.merge(Variables(read_variables(variables, &defaults, &mut mistakes)));
        let mut values: Dict = match figment.extract() {
            Ok(values) => values,
            Err(error) => {
                // The first line says where; the next would show the line, which may be a secret.
                let place = |error: figment::Error| {
                    let text = error.to_string();
                    let line = text.lines().next().unwrap_or_default();
                    format!("{}: {line}", file.unwrap_or(Path::new("settings")).display())
                };
                mistakes.extend(error.into_iter().map(place));
                return Err(ConfigError(mistakes));
            }
        };
        // One mistake ends a reading: note it, put the default in its place, read again.
        let config = loop {
            match Figment::from(Variables(values.clone())).extract::<Self>() {
                Ok(config) => break Some(config),
                Err(error) => {
                    let path = error.path.clone();
                    mistakes.push(describe(&figment, &error));
                    if !replace_by_default(&mut values, &defaults, &path, &error) {
                        break None;
                    }
                }
            }
        };
        if let Some(config) = &config {
            mistakes.extend(config.validate());
        }
        match config {
            Some(config) if mistakes.is_empty() => Ok((config, Effective(values))),
            Some(_) | None => Err(ConfigError(mistakes)),
        }
    }
}

/// Settings from a dictionary.
struct Variables(Dict);

impl Provider for Variables {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment variables")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.0.clone()))
    }
}

/// `TIDEGATE_SECTION__FIELD=text`, read as the type that the default has.
fn read_variables(
    variables: Vec<(String, String)>,
    defaults: &Dict,
    mistakes: &mut Vec<String>,
) -> Dict {
    let mut values = Dict::new();
    for (variable, text) in variables {
        let Some(name) = variable.strip_prefix("TIDEGATE_") else {
            if variable == "DATABASE_URL" {
                values.entry("database_url".to_owned()).or_insert_with(|| text.into());
            }
            continue;
        };
        let name = name.to_ascii_lowercase();
        if NOT_SETTINGS.contains(&name.as_str()) {
            continue;
        }
        let (section, field) = match name.split_once("__") {
            Some((section, field)) => (Some(section), field),
            None => (None, name.as_str()),
        };
        let default = match section {
            Some(section) => defaults.get(section).and_then(|table| table.as_dict()?.get(field)),
            None => defaults.get(field),
        };
        let Some(value) = default.and_then(|default| read_as(default, &text)) else {
            mistakes.push(match default {
                Some(default) => format!("{variable}: expected {}", expected(default)),
                None => format!("{variable}: no such setting"),
            });
            continue;
        };
        match section {
            None => {
                values.insert(field.to_owned(), value);
            }
            Some(section) => {
                let entry = values.entry(section.to_owned()).or_insert_with(|| Dict::new().into());
                if let Value::Dict(_, fields) = entry {
                    fields.insert(field.to_owned(), value);
                }
            }
        }
    }
    values
}

fn read_as(default: &Value, text: &str) -> Option<Value> {
    match default {
        Value::String(..) => Some(text.into()),
        Value::Bool(..) => text.parse::<bool>().ok().map(Value::from),
        Value::Num(..) => text.parse::<u64>().ok().map(Value::from),
        // Rules are a list of another kind, and not for a variable.
        Value::Array(_, rules) if !rules.is_empty() => None,
        Value::Array(..) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Some(parts.map(Value::from).collect::<Vec<_>>().into())
        }
        Value::Char(..) | Value::Empty(..) | Value::Dict(..) => None,
    }
}

fn expected(default: &Value) -> &'static str {
    match default {
        Value::Bool(..) => "true or false",
        Value::Num(_, Num::F32(_) | Num::F64(_)) => "a number",
        Value::Num(..) => "a whole number",
        Value::String(..) | Value::Char(..) => "a text",
        Value::Empty(..) | Value::Dict(..) | Value::Array(..) => "a settings file, not a variable",
    }
}

/// The mistake with its setting and where that was set; never its value, which may be a secret.
fn describe(figment: &Figment, error: &figment::Error) -> String {
    let path = error.path.join(".");
    let source = figment
        .find_metadata(&path)
        .map(|metadata| match &metadata.source {
            Some(source) => format!(" (from {source})"),
            None => format!(" (from {})", metadata.name),
        })
        .unwrap_or_default();
    let is_secret = SECRETS.iter().any(|secret| path == *secret);
    let text = if is_secret { "expected a text".to_owned() } else { error.kind.to_string() };
    if path.is_empty() { text } else { format!("{path}: {text}{source}") }
}

/// Puts the default, or nothing, where the mistake is. False if that changes nothing.
fn replace_by_default(
    values: &mut Dict,
    defaults: &Dict,
    path: &[String],
    error: &figment::Error,
) -> bool {
    let mut path: Vec<&str> = path.iter().map(String::as_str).collect();
    // An unknown field is named by the error, not by its path.
    if let figment::error::Kind::UnknownField(field, _) = &error.kind
        && path.last() != Some(&field.as_str())
    {
        path.push(field);
    }
    // Rules are a list: a mistake in one replaces them all.
    if path.first() == Some(&"topic") {
        path.truncate(1);
    }
    match path.as_slice() {
        [name] => replace(values, defaults.get(*name), name),
        [section, name, ..] => {
            let default = defaults.get(*section).and_then(Value::as_dict);
            match values.get_mut(*section) {
                Some(Value::Dict(_, fields)) => {
                    replace(fields, default.and_then(|fields| fields.get(*name)), name)
                }
                _ => replace(values, defaults.get(*section), section),
            }
        }
        [] => false,
    }
}

fn replace(values: &mut Dict, default: Option<&Value>, name: &str) -> bool {
    match default {
        Some(default) => values.insert(name.to_owned(), default.clone()).as_ref() != Some(default),
        None => values.remove(name).is_some(),
    }
}
