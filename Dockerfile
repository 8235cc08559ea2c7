# One binary, which needs the C library and nothing else, run by nobody in particular.

FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked && cp target/release/tidegate /tidegate

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /tidegate /usr/local/bin/tidegate
EXPOSE 4000 9400
ENTRYPOINT ["/usr/local/bin/tidegate"]
CMD ["serve"]
