//! What a client is told when something is refused: the closed list of operational codes.
//!
//! The same table is `protocol/errors.json`; a test compares them.

use std::borrow::Cow;

use serde_json::json;

use super::message::Json;

/// Supabase's operational codes, as far as this server answers with them.
///
/// Source: supabase/realtime `ERROR_CODES.md` and `realtime_channel.ex` @833cf36.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The upgrade carries no key.
    MissingApiKey,
    /// The token has expired, or lacks `role` or `exp`.
    InvalidJwtToken,
    /// The token is not a JWT.
    MalformedJwt,
    /// The token is not signed with our key.
    JwtSignatureError,
    /// No key of ours can check the token's algorithm.
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
    /// The topic's rules, or the lack of one, forbid it.
    Unauthorized,
    /// A field of the join cannot be read and has no safe default.
    InvalidJoinPayload,
    /// Replay is for private channels.
    UnableToReplayMessages,
    /// The database that private channels need is not there, or not set up.
    UnableToConnectToProject,
    /// All of the gateway's sessions for policies are busy.
    IncreaseConnectionPool,
    /// The policies took too long.
    QueryCanceled,
    /// `realtime.messages` has no partition for today.
    MissingPartition,
    /// The server is draining.
    RealtimeRestarting,
    /// Anything else about one channel.
    UnknownErrorOnChannel,
}

impl ErrorCode {
    /// Every code, for the metric's label set and the table of errors.
    pub const ALL: [Self; 19] = [
        Self::MissingApiKey,
        Self::InvalidJwtToken,
        Self::MalformedJwt,
        Self::JwtSignatureError,
        Self::JwtSignerError,
        Self::ConnectionRateLimitReached,
        Self::ClientJoinRateLimitReached,
        Self::ChannelRateLimitReached,
        Self::TopicNameRequired,
        Self::PrivateOnly,
        Self::Unauthorized,
        Self::InvalidJoinPayload,
        Self::UnableToReplayMessages,
        Self::UnableToConnectToProject,
        Self::IncreaseConnectionPool,
        Self::QueryCanceled,
        Self::MissingPartition,
        Self::RealtimeRestarting,
        Self::UnknownErrorOnChannel,
    ];

    /// The code as it stands on the wire and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MissingApiKey => "MissingAPIKey",
            Self::InvalidJwtToken => "InvalidJWTToken",
            Self::MalformedJwt => "MalformedJWT",
            Self::JwtSignatureError => "JwtSignatureError",
            Self::JwtSignerError => "JwtSignerError",
            Self::ConnectionRateLimitReached => "ConnectionRateLimitReached",
            Self::ClientJoinRateLimitReached => "ClientJoinRateLimitReached",
            Self::ChannelRateLimitReached => "ChannelRateLimitReached",
            Self::TopicNameRequired => "TopicNameRequired",
            Self::PrivateOnly => "PrivateOnly",
            Self::Unauthorized => "Unauthorized",
            Self::InvalidJoinPayload => "InvalidJoinPayload",
            Self::UnableToReplayMessages => "UnableToReplayMessages",
            Self::UnableToConnectToProject => "UnableToConnectToProject",
            Self::IncreaseConnectionPool => "IncreaseConnectionPool",
            Self::QueryCanceled => "QueryCanceled",
            Self::MissingPartition => "MissingPartition",
            Self::RealtimeRestarting => "RealtimeRestarting",
            Self::UnknownErrorOnChannel => "UnknownErrorOnChannel",
        }
    }

    /// The text that goes with the code where the refusal gives no other.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::MissingApiKey => "API key is missing",
            Self::InvalidJwtToken => "Fields `role` and `exp` are required in JWT",
            Self::MalformedJwt => "The token provided is not a valid JWT",
            Self::JwtSignatureError => "Failed to validate JWT signature",
            Self::JwtSignerError => {
                "Failed to generate JWT signer, check your JWT secret or JWKS configuration"
            }
            Self::ConnectionRateLimitReached => "Too many connected users",
            Self::ClientJoinRateLimitReached => "Too many joins per second",
            Self::ChannelRateLimitReached => "Too many channels",
            Self::TopicNameRequired => "You must provide a topic name",
            Self::PrivateOnly => "This project only allows private channels",
            Self::Unauthorized => {
                "You do not have permissions to read from this Channel topic: <sub>"
            }
            Self::InvalidJoinPayload => "`private` must be a boolean",
            Self::UnableToReplayMessages => "Replay is not allowed for public channels",
            Self::UnableToConnectToProject => {
                "Realtime was unable to connect to the project database"
            }
            Self::IncreaseConnectionPool => "Please increase your connection pool size",
            Self::QueryCanceled => "Query was cancelled, please try again",
            Self::MissingPartition => "Realtime was unable to find the expected messages partition",
            Self::RealtimeRestarting => "Realtime is restarting, please standby",
            Self::UnknownErrorOnChannel => "expected params to be an object",
        }
    }

    /// The HTTP status of a refused upgrade.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::MissingApiKey
            | Self::InvalidJwtToken
            | Self::MalformedJwt
            | Self::JwtSignatureError
            | Self::JwtSignerError => 401,
            Self::PrivateOnly | Self::Unauthorized => 403,
            Self::ConnectionRateLimitReached
            | Self::ClientJoinRateLimitReached
            | Self::ChannelRateLimitReached => 429,
            Self::RealtimeRestarting
            | Self::UnableToConnectToProject
            | Self::IncreaseConnectionPool
            | Self::QueryCanceled
            | Self::MissingPartition => 503,
            Self::TopicNameRequired
            | Self::InvalidJoinPayload
            | Self::UnableToReplayMessages
            | Self::UnknownErrorOnChannel => 400,
        }
    }
}

/// A named no to a client: a code, and a text of its own where the code's is not enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which.
    pub code: ErrorCode,
    detail: Option<Cow<'static, str>>,
}

impl Refusal {
    /// The code with its own text.
    #[must_use]
    pub const fn new(code: ErrorCode) -> Self {
        Self { code, detail: None }
    }

    /// The code with another text.
    #[must_use]
    pub fn with_detail(code: ErrorCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: Some(detail.into()) }
    }

    /// The refusal to read a topic: the same whether it is forbidden or unknown.
    #[must_use]
    pub fn unauthorized(sub_topic: &str) -> Self {
        Self::with_detail(
            ErrorCode::Unauthorized,
            format!("You do not have permissions to read from this Channel topic: {sub_topic}"),
        )
    }

    /// The text without the code: of a refused upgrade and of a `system` push.
    #[must_use]
    pub fn text(&self) -> &str {
        self.detail.as_deref().unwrap_or_else(|| self.code.text())
    }

    /// The payload of an error reply:
    /// `{"status":"error","response":{"reason":"TopicNameRequired: You must provide a topic name"}}`.
    pub(crate) fn reply(&self) -> Json {
        error_reply(&format!("{}: {}", self.code.as_str(), self.text()))
    }
}

/// The payload of an error reply with this reason.
pub(crate) fn error_reply(reason: &str) -> Json {
    Json::from_value(&json!({ "status": "error", "response": { "reason": reason } }))
}
