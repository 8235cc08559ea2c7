// Just enough of an auth server for a client to sign in and out.

/** Answers a request below `/auth/v1`, with a session of this token. */
export function answerAuth(request, response, token) {
  request.resume();
  if (request.url.startsWith('/auth/v1/logout')) return response.writeHead(204).end();
  const { sub, exp } = JSON.parse(Buffer.from(token.split('.')[1], 'base64url'));
  const seconds = exp - Math.floor(Date.now() / 1000);
  const session = {
    access_token: token,
    token_type: 'bearer',
    expires_in: seconds,
    expires_at: exp,
    refresh_token: 'refresh',
    user: { id: sub, aud: 'authenticated', role: 'authenticated', email: 'a@example.org' },
  };
  response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(session));
}
