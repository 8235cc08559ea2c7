-- The gateway reads the history and the failures of triggers, and deletes through
-- tidegate.forget_history() alone: who may delete from a table may lock all of it, and so hold up
-- every write that has a trigger. The system file
-- (migrations/broadcast_cache_invalidation_system.sql) says the same; it may have run before or may
-- run after this.

do $$
begin
    if exists (select from pg_roles where rolname = 'tidegate') then
        revoke insert, update, delete, truncate on tidegate.broadcast_history from tidegate;
        if to_regclass('tidegate.trigger_failures') is not null then
            revoke insert, update, delete, truncate on tidegate.trigger_failures from tidegate;
        end if;
    end if;
end
$$;
