-- Tokens that are good and shall open nothing, shared by all gateways: one that starts reads them
-- before they are over, one that runs is told of a change. Without this table a revocation holds on
-- the gateway that took it, until that ends. The system file
-- (migrations/broadcast_cache_invalidation_system.sql) may have run before or may run after this.

create table tidegate.revocations (
    claim text not null check (claim in ('sub', 'session_id', 'jti')),
    value text not null check (octet_length(value) between 1 and 128),
    at timestamptz not null default clock_timestamp(),
    until timestamptz not null,
    primary key (claim, value)
);
create index revocations_until_idx on tidegate.revocations (until);
comment on table tidegate.revocations is
    'Whose tokens open nothing, until when; a row goes when its time is over.';

do $$
declare
    browser name;
begin
    for browser in
        select 'public'
        union all
        select quote_ident(rolname) from pg_roles where rolname in ('anon', 'authenticated')
    loop
        execute format('revoke all on tidegate.revocations from %s', browser);
    end loop;
    if exists (select from pg_roles where rolname = 'tidegate') then
        grant select, insert, update, delete on tidegate.revocations to tidegate;
    end if;
end
$$;
