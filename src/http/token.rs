//! The token of a request, within the limits of its address.

use std::sync::Arc;

use super::shared::Shared;
use crate::{
    auth::{Token, TokenError},
    limits::Limited,
    telemetry::audit::Caller,
};

/// What an address is told whose token is not read.
pub(super) const TOO_MANY_REQUESTS: &str = "Too many requests";

/// Why a request has no verified token.
pub(super) enum TokenRefused {
    /// The token is wrong, or there is none.
    Wrong(TokenError),
    /// The address has brought too many wrong tokens, and this one is neither known to be right nor
    /// a JWT. All viewers of a venue have one address, and what they have been given opens whatever
    /// one of them tries: nobody guesses a signature, and how many are verified is bounded by the
    /// rates of upgrades and of requests.
    Unread,
}

impl TokenRefused {
    /// The fault as the audit log names it.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Wrong(error) => error.label(),
            Self::Unread => "unread",
        }
    }
}

/// Verifies the token of a request.
///
/// # Errors
/// [`TokenRefused`]; a wrong token counts against the caller's address.
pub(super) fn verify(
    shared: &Shared,
    caller: Caller,
    text: Option<&str>,
) -> Result<Arc<Token>, TokenRefused> {
    let Some(text) = text else {
        shared.auth.count_missing();
        return Err(TokenRefused::Wrong(TokenError::Missing));
    };
    let (addresses, address) = (&shared.limits.addresses, caller.address().into());
    let is_known = shared.auth.is_known(text);
    if !is_known && !addresses.may_fail(address) && !shared.auth.is_jwt(text) {
        shared.limits.count(Limited::AddressFailures);
        return Err(TokenRefused::Unread);
    }
    let verified = shared.auth.verify(text);
    if !is_known && verified.is_err() {
        addresses.fail(address);
    }
    verified.map_err(TokenRefused::Wrong)
}
