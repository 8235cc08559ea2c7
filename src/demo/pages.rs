//! The demo's routes on the gateway's public port: the page, its key, the `/live` endpoints.
//!
//! Invariants: the page's files are read once, at start, and no request names a file; the page
//! needs nothing from elsewhere, so that it works offline, and its content security policy forbids
//! anything else.

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
};

use bytes::Bytes;
use hyper::{
    Method, StatusCode,
    header::{self, HeaderValue},
};
use serde_json::json;
use sqlx::PgPool;

use crate::http::{Answering, Request, Response, content, empty, message, not_found};

use super::{example::EVENTS, live::Endpoint};

/// The page's files: route, place below the directory, type.
const FILES: [(&str, &str, &str); 4] = [
    ("/demo", "index.html", "text/html; charset=utf-8"),
    ("/demo/demo.css", "demo.css", "text/css; charset=utf-8"),
    ("/demo/demo.js", "demo.js", SCRIPT),
    ("/demo/supabase.js", BUNDLE, SCRIPT),
];
const SCRIPT: &str = "text/javascript; charset=utf-8";
/// The published client, as npm installs it.
const BUNDLE: &str = "node_modules/@supabase/supabase-js/dist/umd/supabase.js";

/// Content security policy: only what this port serves, and nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
    img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The published client has not been installed.
    #[error("{} is missing: run `make demo`, or `npm ci --prefix {}`", .file.display(), .dir.display())]
    NoBundle {
        /// The file.
        file: PathBuf,
        /// The directory of its `package.json`.
        dir: PathBuf,
    },
    /// One of the page's own files cannot be read.
    #[error("cannot read {} (--pages names the page's directory)", .file.display())]
    NoPage {
        /// The file.
        file: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The page's files, in the order of [`FILES`].
#[derive(Debug)]
pub(super) struct Pages([Bytes; FILES.len()]);

impl Pages {
    /// Reads the page's files.
    ///
    /// # Errors
    /// [`PagesError`] if one is missing.
    pub(super) fn load(dir: &Path) -> Result<Self, PagesError> {
        let mut pages = Self(Default::default());
        for (page, (_, name, _)) in pages.0.iter_mut().zip(FILES) {
            let file = dir.join(name);
            *page = match fs::read(&file) {
                Ok(bytes) => bytes.into(),
                Err(error) if name == BUNDLE && error.kind() == io::ErrorKind::NotFound => {
                    return Err(PagesError::NoBundle { file, dir: dir.to_owned() });
                }
                Err(source) => return Err(PagesError::NoPage { file, source }),
            };
        }
        Ok(pages)
    }
}

/// Everything that the demo serves.
#[derive(Debug)]
pub(super) struct Site {
    pages: Pages,
    config: String,
    pool: PgPool,
}

impl Site {
    pub(super) fn new(
        pages: Pages,
        anon_key: &str,
        prometheus: Option<&str>,
        pool: PgPool,
    ) -> Self {
        let events: Vec<_> =
            EVENTS.iter().map(|event| json!({ "eid": event.eid, "name": event.name })).collect();
        // The URL is relative to the page: only the browser knows by which name it came here.
        let config = json!({
            "url": "/", "anonKey": anon_key, "events": events, "prometheus": prometheus,
        });
        Self { pages, config: config.to_string(), pool }
    }

    /// Answers requests from memory; `Err` is an endpoint that the database answers.
    fn route(&self, request: &Request) -> Result<Response, Endpoint> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = message(StatusCode::METHOD_NOT_ALLOWED, "method not allowed");
            answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return Ok(answer);
        }
        let path = request.uri().path();
        let page = FILES.iter().zip(&self.pages.0).find(|((route, ..), _)| *route == path);
        if let Some(((_, _, content_type), bytes)) = page {
            return Ok(content(StatusCode::OK, content_type, bytes.clone()));
        }
        match path {
            "/" | "/demo/" => {
                let query = request.uri().query().map(|query| format!("?{query}"));
                let target = format!("/demo{}", query.unwrap_or_default());
                let mut answer = empty(StatusCode::TEMPORARY_REDIRECT);
                if let Ok(target) = HeaderValue::try_from(target) {
                    answer.headers_mut().insert(header::LOCATION, target);
                }
                Ok(answer)
            }
            "/demo/config.json" => Ok(json_text(self.config.clone())),
            _ => match path.parse() {
                Ok(endpoint) => Err(endpoint),
                Err(_not_an_endpoint) => Ok(not_found()),
            },
        }
    }
}

impl Answering for Site {
    fn answer(&self, request: Request) -> Pin<Box<dyn Future<Output = Response> + Send>> {
        let routed = self.route(&request);
        let pool = self.pool.clone();
        Box::pin(async move {
            let answer = match routed {
                Ok(answer) => answer,
                Err(endpoint) => live(&endpoint, &pool).await,
            };
            guarded(answer)
        })
    }
}

async fn live(endpoint: &Endpoint, pool: &PgPool) -> Response {
    match endpoint.read(pool).await {
        Ok(Some(text)) => json_text(text),
        Ok(None) => not_found(),
        Err(error) => {
            tracing::warn!(?endpoint, error = &error as &dyn Error, "cannot read an endpoint");
            message(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer")
        }
    }
}

fn json_text(text: String) -> Response {
    content(StatusCode::OK, "application/json; charset=utf-8", text)
}

fn guarded(mut answer: Response) -> Response {
    for (name, value) in [
        // The next demo on this port has another key and other data.
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        answer.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    answer
}
