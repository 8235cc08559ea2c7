-- Takes away what migrations/schema/ and the system file have made: the triggers, the functions,
-- schema realtime unless somebody else has made it, and schema tidegate with all that is in it, the
-- history too. Run it as the role that ran them; it is safe to run again, and the system file works
-- again afterwards. All of it happens or nothing.
--
--     psql -f migrations/uninstall.sql

do $$
declare
    v_table regclass;
    v_trigger text;
    v_function regprocedure;
begin
    -- Taking a trigger away waits for the writers of its table while new writers wait behind it.
    perform set_config('lock_timeout', '5s', true);

    for v_table, v_trigger in
        select t.tgrelid::regclass, t.tgname
        from pg_catalog.pg_trigger t
        where t.tgfoid = to_regproc('tidegate.cache_invalidation') and t.tgparentid = 0
    loop
        execute format('drop trigger %I on %s', v_trigger, v_table);
    end loop;

    -- Ours alone: an older system has functions by these names, which do not know our schema.
    for v_function in
        select p.oid::regprocedure
        from pg_catalog.pg_proc p
        where p.pronamespace = 'public'::regnamespace
            and p.proname in (
                'manual_cache_invalidation',
                'get_cache_invalidation_stats',
                'enable_cache_invalidation',
                'disable_cache_invalidation'
            )
            and p.prosrc like '%tidegate.%'
    loop
        execute format('drop function %s', v_function);
    end loop;

    if obj_description(to_regnamespace('realtime'), 'pg_namespace')
        = 'Made by Tidegate for private channels.'
    then
        -- Its policies go with it.
        drop table if exists realtime.messages;
        begin
            drop function if exists realtime.topic();
            drop schema realtime;
        exception
            when dependent_objects_still_exist then
                raise notice 'schema realtime is left, because something that is not ours needs it';
        end;
    end if;

    if to_regnamespace('tidegate') is not null then
        drop schema tidegate cascade;
    end if;

    if exists (select from pg_catalog.pg_roles where rolname = 'tidegate') then
        begin
            execute format('revoke connect on database %I from tidegate', current_database());
        exception
            when insufficient_privilege then
                raise notice 'connect on database % is not revoked from tidegate, % may not',
                    current_database(), current_user;
        end;
        raise notice 'role tidegate is left, because other databases may use it: drop role tidegate';
    end if;
end
$$;
