-- The gateway's own schema, and the role that it connects as.
-- The system file (migrations/broadcast_cache_invalidation_system.sql) may have run before or may
-- run after this: what both need, both make.

do $$
declare
    browser name;
begin
    if to_regnamespace('tidegate') is null then
        create schema tidegate;
    end if;

    -- A sub-block each, because a missing right must not undo what could be done.
    begin
        if not exists (select from pg_roles where rolname = 'tidegate') then
            create role tidegate login nosuperuser nocreatedb nocreaterole noreplication;
            raise notice 'role tidegate created: give it a password before the gateway connects as it';
        end if;
    exception
        when insufficient_privilege then
            raise notice 'role tidegate not created, % may not: create role tidegate login',
                current_user;
        when duplicate_object or unique_violation then
            null; -- Another database of the same cluster was migrated at the same moment.
    end;

    revoke all on schema tidegate from public;
    for browser in select rolname from pg_roles where rolname in ('anon', 'authenticated') loop
        execute format('revoke all on schema tidegate from %I', browser);
    end loop;

    if exists (select from pg_roles where rolname = 'tidegate') then
        grant usage on schema tidegate to tidegate;
        begin
            execute format('grant connect on database %I to tidegate', current_database());
        exception
            when insufficient_privilege then
                raise notice 'connect on database % not granted to tidegate, % may not',
                    current_database(), current_user;
        end;
        if to_regprocedure('tidegate.grant_access()') is not null then
            perform tidegate.grant_access();
        end if;
    end if;
end
$$;
