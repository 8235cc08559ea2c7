//! The operational codes with which a client is refused: a closed list.
//!
//! `protocol/errors.json` has the same codes and texts; a test compares them.

use std::borrow::Cow;

use serde_json::json;
use strum::VariantArray;

use super::message::Json;

/// Supabase's operational codes, as far as this server answers with them.
///
/// Source: supabase/realtime `ERROR_CODES.md` and `realtime_channel.ex` @833cf36.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray)]
pub enum ErrorCode {
    /// The upgrade has no key.
    MissingApiKey,
    /// The token has expired, or lacks `role` or `exp`.
    InvalidJwtToken,
    /// The token is not a JWT.
    MalformedJwt,
    /// No key of the project has signed the token.
    JwtSignatureError,
    /// The gateway has no key for the token's algorithm.
    JwtSignerError,
    /// Too many sockets.
    ConnectionRateLimitReached,
    /// Too many joins, or upgrades, per second.
    ClientJoinRateLimitReached,
    /// Too many channels on one socket.
    ChannelRateLimitReached,
    /// `realtime:` without a name.
    TopicNameRequired,
    /// A public join where only private channels are served.
    PrivateOnly,
    /// The topic's rule forbids the action, or topics without a rule are not served.
    Unauthorized,
    /// A field of the join has a wrong type and no safe default, or the join is too large.
    InvalidJoinPayload,
    /// A public channel asks for a replay, which only private channels get.
    UnableToReplayMessages,
    /// The database that decides about private channels is not available, or not set up.
    UnableToConnectToProject,
    /// All database sessions for policies are busy.
    IncreaseConnectionPool,
    /// The policies have not answered in time.
    QueryCanceled,
    /// `realtime.messages` has no partition for today.
    MissingPartition,
    /// The server is draining.
    RealtimeRestarting,
    /// Any other fault of one channel.
    UnknownErrorOnChannel,
}

impl ErrorCode {
    /// Each code with its name on the wire, the HTTP status of a refused upgrade, and the text that
    /// goes with it where a refusal has none of its own. The order is that of the variants.
    const TABLE: [(Self, &'static str, u16, &'static str); Self::VARIANTS.len()] = [
        (Self::MissingApiKey, "MissingAPIKey", 401, "API key is missing"),
        (
            Self::InvalidJwtToken,
            "InvalidJWTToken",
            401,
            "Fields `role` and `exp` are required in JWT",
        ),
        (Self::MalformedJwt, "MalformedJWT", 401, "The token provided is not a valid JWT"),
        (Self::JwtSignatureError, "JwtSignatureError", 401, "Failed to validate JWT signature"),
        (
            Self::JwtSignerError,
            "JwtSignerError",
            401,
            "Failed to generate JWT signer, check your JWT secret or JWKS configuration",
        ),
        (
            Self::ConnectionRateLimitReached,
            "ConnectionRateLimitReached",
            429,
            "Too many connected users",
        ),
        (
            Self::ClientJoinRateLimitReached,
            "ClientJoinRateLimitReached",
            429,
            "Too many joins per second",
        ),
        (Self::ChannelRateLimitReached, "ChannelRateLimitReached", 429, "Too many channels"),
        (Self::TopicNameRequired, "TopicNameRequired", 400, "You must provide a topic name"),
        (Self::PrivateOnly, "PrivateOnly", 403, "This project only allows private channels"),
        (
            Self::Unauthorized,
            "Unauthorized",
            403,
            "You do not have permissions to read from this Channel topic: <sub>",
        ),
        (Self::InvalidJoinPayload, "InvalidJoinPayload", 400, "`private` must be a boolean"),
        (
            Self::UnableToReplayMessages,
            "UnableToReplayMessages",
            400,
            "Replay is not allowed for public channels",
        ),
        (
            Self::UnableToConnectToProject,
            "UnableToConnectToProject",
            503,
            "Realtime was unable to connect to the project database",
        ),
        (
            Self::IncreaseConnectionPool,
            "IncreaseConnectionPool",
            503,
            "Please increase your connection pool size",
        ),
        (Self::QueryCanceled, "QueryCanceled", 503, "Query was cancelled, please try again"),
        (
            Self::MissingPartition,
            "MissingPartition",
            503,
            "Realtime was unable to find the expected messages partition",
        ),
        (
            Self::RealtimeRestarting,
            "RealtimeRestarting",
            503,
            "Realtime is restarting, please standby",
        ),
        (
            Self::UnknownErrorOnChannel,
            "UnknownErrorOnChannel",
            400,
            "expected params to be an object",
        ),
    ];

    #[expect(clippy::indexing_slicing, reason = "the table has a row for each code")]
    const fn row(self) -> (Self, &'static str, u16, &'static str) {
        Self::TABLE[self as usize]
    }

    /// The code as it stands on the wire and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        let (_, name, _, _) = self.row();
        name
    }

    /// The text that goes with the code where a refusal has none of its own.
    #[must_use]
    pub fn text(self) -> &'static str {
        let (_, _, _, text) = self.row();
        text
    }

    /// The HTTP status of a refused upgrade.
    #[must_use]
    pub fn status(self) -> u16 {
        let (_, _, status, _) = self.row();
        status
    }
}

/// Checks at compile time that the rows stand in the order of the variants.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const _: () = {
    let mut place = 0;
    while place < ErrorCode::TABLE.len() {
        assert!(ErrorCode::TABLE[place].0 as usize == place);
        place += 1;
    }
};

/// The code as the value of a label.
impl From<ErrorCode> for &'static str {
    fn from(code: ErrorCode) -> Self {
        code.as_str()
    }
}

/// A refusal with a name: a code, and a text of its own where that of the code is not enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The code.
    pub code: ErrorCode,
    detail: Option<Cow<'static, str>>,
}

impl Refusal {
    /// Creates a refusal with the text of its code.
    #[must_use]
    pub const fn new(code: ErrorCode) -> Self {
        Self { code, detail: None }
    }

    /// Creates a refusal with another text.
    #[must_use]
    pub fn with_detail(code: ErrorCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: Some(detail.into()) }
    }

    /// Creates the refusal to read a topic: the same for a forbidden topic and an unknown one.
    #[must_use]
    pub fn unauthorized(sub_topic: &str) -> Self {
        Self::with_detail(
            ErrorCode::Unauthorized,
            format!("You do not have permissions to read from this Channel topic: {sub_topic}"),
        )
    }

    /// The text without the code, as in a refused upgrade and in a `system` push.
    #[must_use]
    pub fn text(&self) -> &str {
        self.detail.as_deref().unwrap_or_else(|| self.code.text())
    }

    /// Returns the payload of an error reply:
    /// `{"status":"error","response":{"reason":"TopicNameRequired: You must provide a topic name"}}`.
    pub(crate) fn reply(&self) -> Json {
        error_reply(&format!("{}: {}", self.code.as_str(), self.text()))
    }
}

/// Returns the payload of an error reply with this reason.
pub(crate) fn error_reply(reason: &str) -> Json {
    Json::from_value(&json!({ "status": "error", "response": { "reason": reason } }))
}
