// Embedding. Maths, shapes and source: kernels/gather.rs.
//   embedding           grid ⌈M·N·E / WG⌉              thread = element of y, so table rows are read side by side
//   embedding_backward  grid tables·segments·⌈V/WG⌉·⌈E/WG⌉  block = segment, WG table rows, WG columns; thread = column
//   embedding_invalid   grid lists                     block = list of ids

struct GatherParams {
    uint32_t models;
    uint32_t rows;
    uint32_t width;
    uint32_t vocabulary;
    uint32_t ids_step;
    uint32_t ids_period;
    uint32_t table_step;
    uint32_t segment;
    uint32_t segments;
    uint32_t table_at;
    uint32_t ids_at;
    uint32_t y_at;
};

// ---- forward ----------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    embedding(const float* __restrict__ table, const uint32_t* __restrict__ ids, float* __restrict__ y, GatherParams params) {
    const uint32_t i = group_index() * WG + threadIdx.x;
    const uint32_t row = i / params.width;
    if (row >= params.models * params.rows) {
        return;
    }
    const uint32_t m = row / params.rows;
    const uint32_t id = ids[params.ids_at + m * params.ids_step + row % params.rows];
    y[params.y_at + i] = id < params.vocabulary ? table[params.table_at + m * params.table_step + id * params.width + i % params.width] : 0.0f;
}

// ---- backward ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    embedding_backward(const float* __restrict__ grad_y, const uint32_t* __restrict__ ids, float* __restrict__ sums, GatherParams params) {
    __shared__ uint32_t sh_id[WG];
    const uint32_t tid = threadIdx.x;
    const uint32_t row_tiles = (params.vocabulary + WG - 1) / WG, column_tiles = (params.width + WG - 1) / WG;
    uint32_t group = group_index();
    const uint32_t column = (group % column_tiles) * WG + tid;
    group /= column_tiles;
    const uint32_t first_row = (group % row_tiles) * WG;
    group /= row_tiles;
    const uint32_t m = group / params.segments, segment = group % params.segments;
    if (m >= params.models) {
        return;
    }
    const uint32_t own_rows = min((uint32_t)WG, params.vocabulary - first_row);
    float* own = sums + params.y_at + ((m * params.segments + segment) * params.vocabulary + first_row) * params.width + column;
    // zero the rows that are this block's
    if (column < params.width) {
        for (uint32_t r = 0; r < own_rows; r++) {
            own[r * params.width] = 0.0f;
        }
    }
    const uint32_t end = min((segment + 1) * params.segment, params.rows);
    for (uint32_t n = segment * params.segment; n < end; n += WG) {
        if (n + tid < end) {
            sh_id[tid] = ids[params.ids_at + m * params.ids_step + (n + tid) % params.ids_period];
        }
        __syncthreads();
        if (column < params.width) {
            const uint32_t count = min((uint32_t)WG, end - n);
            for (uint32_t k = 0; k < count; k++) {
                const uint32_t r = sh_id[k] - first_row;
                if (r < own_rows) {
                    own[r * params.width] += grad_y[params.table_at + (m * params.rows + n + k) * params.width + column];
                }
            }
        }
        __syncthreads();
    }
}

// ---- ids beyond the table ---------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(WG)
    embedding_invalid(const uint32_t* __restrict__ ids, uint32_t* __restrict__ invalid, GatherParams params) {
    __shared__ uint32_t sh_count[WG];
    const uint32_t m = group_index(), tid = threadIdx.x;
    if (m >= params.models) {
        return;
    }
    uint32_t count = 0;
    for (uint32_t n = tid; n < params.rows; n += WG) {
        count += ids[params.ids_at + m * params.ids_step + n] >= params.vocabulary ? 1 : 0;
    }
    sh_count[tid] = count;
    __syncthreads();
    for (uint32_t half = WG / 2; half > 0; half /= 2) {
        if (tid < half) {
            sh_count[tid] += sh_count[tid + half];
        }
        __syncthreads();
    }
    if (tid == 0) {
        invalid[params.y_at + m] = sh_count[0];
    }
}
