-- Tries a change of each table that has a trigger, within the caller's transaction, which rolls
-- back; each attempt is undone before the next. What was tried stands in the setting
-- tidegate.doctor, as JSON: for each table the outcome `told`, `silent`, `refused`, `empty`,
-- `absent`, `closed` (no rights) or `outside` (another trigger may do what no rollback undoes).
--
-- A vote, a bid and a photo are inserted, where their columns can be guessed; else, and in all
-- other tables, one of the first rows is updated to what it is.
do $$
declare
    v_results jsonb;
    v_table text;
    v_class oid;
    v_art jsonb;
    v_eid text;
    v_person text;
    v_values jsonb;
    v_columns text;
    v_column text;
    v_outside text;
    v_partition oid;
    v_place tid;
    v_assignment text;
    v_before bigint;
    v_failures_before bigint;
    v_outcome text;
    v_operation text;
    v_told jsonb;
    v_message text;
    v_failure text;
    v_constraint text;
begin
    v_results := '[]';
    begin
        -- Postgres counts rows of transactions that are rolled back, too; what is compared with the
        -- history should not count them. Only a superuser may say so.
        perform set_config('track_counts', 'off', true);
    exception
        when others then
            null;
    end;
    begin
        select to_jsonb(a.*), e.eid into v_art, v_eid
        from public.art a join public.events e on e.id = a.event_id
        where e.eid ~ '^[A-Za-z0-9-]{1,46}$'
        order by to_jsonb(a.*) ->> 'easel' is null
        limit 1;
    exception
        when others then
            null; -- The tables are missing, or closed: each says so itself.
    end;
    begin
        execute 'select p.id::text from public.people p limit 1' into v_person;
    exception
        when others then
            null;
    end;
    v_person := coalesce(v_person, gen_random_uuid()::text);

    for v_table in
        values ('votes'), ('bids'), ('art_media'), ('art'), ('event_artists'), ('round_contestants'),
            ('artwork_offers'), ('payment_processing'), ('events')
    loop
        v_outcome := null;
        v_operation := null;
        v_told := null;
        v_message := null;
        select c.oid into v_class
        from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'public' and c.relname = v_table and c.relkind in ('r', 'p');
        if v_class is null then
            v_outcome := 'absent';
        elsif not (has_table_privilege(v_class, 'SELECT') and has_table_privilege(v_class, 'UPDATE')) then
            v_outcome := 'closed';
        else
            select t.tgname into v_outside
            from pg_catalog.pg_trigger t
            join pg_catalog.pg_proc p on p.oid = t.tgfoid
            join pg_catalog.pg_language l on l.oid = p.prolang
            where t.tgrelid = v_class and not t.tgisinternal and t.tgenabled not in ('D', 'R')
                and p.pronamespace <> 'tidegate'::regnamespace
                and (
                    l.lanname not in ('plpgsql', 'sql', 'internal', 'c')
                    -- What pg_net is asked for is a row, which the rollback takes back.
                    or regexp_replace(p.prosrc, 'net\.http_', '', 'gi')
                        ~* '\m(http|http_(get|post|put|patch|delete|head)|dblink\w*|pg_background\w*)\s*\('
                )
            limit 1;
            if v_outside is not null then
                v_outcome := 'outside';
                v_message := v_outside;
            end if;
        end if;

        -- The first attempt is an insertion, the others take the first rows.
        for v_attempt in 0 .. 5 loop
            exit when v_outcome is not null;
            v_failure := null;
            begin
                select coalesce(max(h.id), 0) into v_before from tidegate.broadcast_history h;
                select coalesce(max(f.id), 0) into v_failures_before from tidegate.trigger_failures f;
                if v_attempt = 0 then
                    continue when v_art is null or v_table not in ('votes', 'bids', 'art_media')
                        or not has_table_privilege(v_class, 'INSERT');
                    v_operation := 'INSERT';
                    v_values := jsonb_build_object(
                        'event_id', v_art -> 'event_id', 'eid', v_eid,
                        'round', v_art -> 'round', 'easel', v_art -> 'easel',
                        'art_uuid', v_art -> 'id', 'artwork_id', v_art -> 'id', 'art_id', v_art -> 'id',
                        'person_id', v_person, 'amount', 1 + coalesce((v_art ->> 'current_bid')::numeric, 0));
                    -- Where the uuid has a column of its own, art_id is the artwork's code.
                    if exists (
                        select from pg_catalog.pg_attribute
                        where attrelid = v_class and attname = 'art_uuid' and not attisdropped
                    ) then
                        v_values := v_values || jsonb_build_object(
                            'art_id', coalesce(v_art -> 'art_code', v_art -> 'id'));
                    end if;
                    select string_agg(quote_ident(attname), ', ') into v_columns
                    from pg_catalog.pg_attribute
                    where attrelid = v_class and attnum > 0 and not attisdropped
                        and attgenerated = '' and attidentity <> 'a' and v_values ? attname::text;
                    execute format(
                        'insert into public.%1$I (%2$s) select %2$s from jsonb_populate_record(null::public.%1$I, $1)',
                        v_table, v_columns) using v_values;
                else
                    v_place := null;
                    execute format(
                        'select t.tableoid, t.ctid from public.%I t offset %s limit 1', v_table, v_attempt - 1)
                        into v_partition, v_place;
                    exit when v_place is null;
                    v_operation := 'UPDATE';
                    select attname into v_column
                    from pg_catalog.pg_attribute
                    where attrelid = v_class and attnum > 0 and not attisdropped
                        and attgenerated = '' and attidentity = ''
                        -- Of payments only their end is told.
                        and (v_table <> 'payment_processing' or attname in ('status', 'payment_status'))
                    order by attnum
                    limit 1;
                    v_assignment := format('%1$I = %1$I', v_column);
                    if v_table = 'payment_processing' then
                        execute format(
                            'select case when %1$I::text = ''completed'' then ''failed'' else ''completed'' end
                            from public.payment_processing where tableoid = $1 and ctid = $2', v_column)
                            into v_assignment using v_partition, v_place;
                        v_assignment := format('%I = %L', v_column, v_assignment);
                    end if;
                    execute format(
                        'update public.%I set %s where tableoid = $1 and ctid = $2', v_table, v_assignment)
                        using v_partition, v_place;
                end if;
                select jsonb_agg(jsonb_build_object('eid', h.eid, 'type', h.type, 'endpoints', h.endpoints) order by h.id)
                into v_told
                from tidegate.broadcast_history h
                where h.xact = pg_current_xact_id() and h.id > v_before and h.table_name = v_table;
                select f.message into v_failure
                from tidegate.trigger_failures f
                where f.xact = pg_current_xact_id() and f.id > v_failures_before
                order by f.id
                limit 1;
                raise exception using errcode = 'TGDOC';
            exception
                when sqlstate 'TGDOC' then
                    if v_told is not null then
                        v_outcome := 'told';
                        v_message := v_failure;
                    else
                        v_message := coalesce('silent: ' || v_failure, v_message, 'silent');
                    end if;
                when others then
                    -- The error's own words may quote what is in the row.
                    get stacked diagnostics
                        v_constraint = constraint_name, v_column = column_name;
                    v_message := coalesce(v_message, concat_ws(
                        ' ', sqlstate, nullif(v_constraint, ''), nullif(v_column, '')));
                    -- A table that is locked stays so.
                    if sqlstate = '55P03' then
                        v_outcome := 'refused';
                    end if;
            end;
        end loop;
        if v_outcome is null then
            v_outcome := case
                when v_message is null then 'empty'
                when v_message like 'silent%' then 'silent'
                else 'refused'
            end;
            v_message := nullif(regexp_replace(v_message, '^silent(: )?', ''), '');
        end if;
        v_results := v_results || jsonb_build_object(
            'table', v_table, 'outcome', v_outcome, 'operation', v_operation,
            'told', coalesce(v_told, '[]'), 'message', v_message);
    end loop;
    perform set_config('tidegate.doctor', v_results::text, true);
end
$$
