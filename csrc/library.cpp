// Every operator's schema, in one place. Kernels register themselves beside their code: cpu/<family>.cpp,
// cuda/<family>.cu; the Triton backend copies these schemas. The formulas are in peft_kernels/reference/<family>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peft_kernels, m) {
  // Keep mask [rows, columns] of the Philox stream that rng_state (int64: seed, offset) stands for.
  m.def("dropout_mask(SymInt rows, SymInt columns, float dropout_p, Tensor rng_state) -> Tensor");

  // scaling (D * x) factor^T: x [M, C], factor [r, C] -> [M, r] in the accumulation dtype.
  m.def("lora_shrink(Tensor x, Tensor factor, float scaling, float dropout_p, Tensor? rng_state) -> Tensor");
  // out += D * (scaling hidden factor): out [M, C], hidden [M, r], factor [r, C].
  m.def(
      "lora_accumulate_(Tensor(a!) out, Tensor hidden, Tensor factor, float scaling, float dropout_p, "
      "Tensor? rng_state) -> ()");
  // x matrix + bias + D * (scaling hidden factor): x [M, C_in], matrix [C_in, C_out], factor [r, C_out] -> [M, C_out].
  m.def(
      "lora_matmul(Tensor x, Tensor matrix, Tensor? bias, Tensor hidden, Tensor factor, float scaling, "
      "float dropout_p, Tensor? rng_state) -> Tensor");
  // scaling hidden^T (D * x): x [M, C], hidden [M, r] -> [r, C], or [C, r] when transposed, in dtype.
  m.def(
      "lora_factor_grad(Tensor x, Tensor hidden, float scaling, float dropout_p, Tensor? rng_state, "
      "ScalarType dtype, bool transposed) -> Tensor");
  // (scaling dy lora_b [M, r], scaling dy^T hidden [N, r]): dy [M, N], hidden [M, r], lora_b [N, r].
  m.def("lora_grad_b(Tensor grad_out, Tensor hidden, Tensor lora_b, float scaling) -> (Tensor, Tensor)");

  // The layer in one call each way, of the products above: (y [M, N], hidden = (D * x) lora_a^T [M, r]).
  m.def(
      "lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, "
      "float dropout_p, Tensor? rng_state) -> (Tensor, Tensor)");
  // (dx [M, K], grad_a [r, K], grad_b [N, r]), of shape [0] where not needed; x only for grad_a.
  m.def(
      "lora_linear_backward(Tensor grad_out, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor hidden, "
      "float scaling, float dropout_p, Tensor? rng_state, bool need_x, bool need_a, bool need_b) "
      "-> (Tensor, Tensor, Tensor)");

  // Sparse deltas: weight [N, K] contiguous; indices [nnz] int32 or int64, flat positions, sorted and unique.
  // weight[indices] = original + values, rounded once; without values original itself.
  m.def("scatter_write_(Tensor(a!) weight, Tensor indices, Tensor original, Tensor? values) -> ()");
  // weight[indices] += scaling values, rounded once.
  m.def("scatter_accumulate_(Tensor(a!) weight, Tensor indices, Tensor values, float scaling) -> ()");
  // (dy^T x)[indices]: dy [M, N], x [M, K] -> [nnz] in dtype.
  m.def("sampled_product(Tensor grad_out, Tensor x, Tensor indices, ScalarType dtype) -> Tensor");
  // One step of AdamW on values [nnz], and what scatter_write_ does with the result.
  m.def(
      "sparse_adamw_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? weight, "
      "Tensor? indices, Tensor? original, int step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> ()");
  // One step of SM3 on values [nnz], with maxima row_max [N] and column_max [K], and what scatter_write_ does.
  m.def(
      "sparse_sm3_(Tensor(a!) values, Tensor grad, Tensor(b!) row_max, Tensor(c!) column_max, Tensor(d!)? exp_avg, "
      "Tensor(e!)? weight, Tensor indices, Tensor? original, float lr, float beta, float eps, float weight_decay) "
      "-> ()");

  // Slices of channels: indices [s] int64, sorted and unique, of the K columns or of the N rows of weight [N, K].
  // x[:, indices]: x [M, K] -> [M, s], contiguous.
  m.def("gather_columns(Tensor x, Tensor indices) -> Tensor");
  // grad_out[:, indices]^T x, of all columns without indices: grad_out [M, A], x [M, B] -> [s or A, B] in dtype.
  m.def("slice_grad(Tensor grad_out, Tensor x, Tensor? indices, ScalarType dtype) -> Tensor");
  // weight[:, indices] = values [N, s] at dim 1, weight[indices, :] = values [s, K] at dim 0, rounded once.
  m.def("slice_write_(Tensor(a!) weight, Tensor indices, Tensor values, int dim) -> ()");
  // weight[held_indices] = held, where given; then original = weight[indices] and weight[indices] = original + change.
  m.def(
      "slice_exchange_(Tensor(a!) weight, Tensor? held_indices, Tensor? held, Tensor indices, Tensor change, "
      "Tensor(b!) original, int dim) -> ()");
  // One step of AdamW on trainable, a slice, and what slice_write_ does with the result.
  m.def(
      "slice_adamw_(Tensor(a!) trainable, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!)? weight, Tensor? indices, int dim, int step, float lr, float beta1, float beta2, float eps, "
      "float weight_decay) -> ()");
  // (h = silu(gate) up [M, K], h[:, indices] [M, s]); its gradients (dgate [M, K], dup [M, K]).
  m.def("swiglu(Tensor gate, Tensor up, Tensor indices) -> (Tensor, Tensor)");
  m.def("swiglu_backward(Tensor grad_h, Tensor gate, Tensor up) -> (Tensor, Tensor)");

  // Token elimination. rows [S] int32: of a matrix with M rows, sorted and unique; negative ones stand for no row.
  m.def("gather_rows(Tensor x, Tensor rows) -> Tensor");
  // residual [M, C] with values [S, C] added at rows, as a new tensor; in place.
  m.def("scatter_add_rows(Tensor residual, Tensor values, Tensor rows) -> Tensor");
  m.def("scatter_add_rows_(Tensor(a!) out, Tensor values, Tensor rows) -> ()");
  // (h = kept rstd (offset + weight) [S, H], kept = x[rows] [S, H], rstd [S]); without rows of all of x, kept [0, H].
  m.def("gather_rms_norm(Tensor x, Tensor? rows, Tensor weight, float eps, float offset) -> (Tensor, Tensor, Tensor)");
  // h again.
  m.def("rms_norm_rows(Tensor kept, Tensor rstd, Tensor weight, float offset) -> Tensor");
  // (dx = grad_residual with dkept added at rows [total, H], dweight [H], or [0] if not wanted).
  m.def(
      "gather_rms_norm_backward(Tensor? grad_residual, Tensor grad_h, Tensor kept, Tensor rstd, Tensor weight, "
      "float offset, Tensor? rows, SymInt total, bool weight_grad) -> (Tensor, Tensor)");
  // The heads of x [S, heads, D] rotated by rows of cos and sin [P, R]; turned back when inverse.
  m.def("rope_rows(Tensor x, Tensor cos, Tensor sin, Tensor? rows, bool inverse) -> Tensor");
  // residual [M, N] with x[rows] weight^T + bias added at rows; without residual the product alone, [S, N].
  m.def(
      "gather_linear_scatter(Tensor x, Tensor weight, Tensor? bias, Tensor rows, Tensor? residual, bool gather, "
      "bool transposed) -> Tensor");
  // The same in place of out [M, N], which lies apart from x, weight and bias.
  m.def(
      "gather_linear_scatter_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor rows, bool gather, "
      "bool transposed) -> ()");
  // Informativeness of the blocks of keys: q [B, heads, T, D], k [B, key_value_heads, T, D] -> [B, T // block_size].
  m.def("block_scores(Tensor q, Tensor k, SymInt block_size, Tensor? starts) -> Tensor");
  // Tokens of the blocks with the largest scores [B, tokens // block_size]: positions int32, sorted, then -1; counts.
  m.def(
      "select_tokens(Tensor scores, SymInt tokens, SymInt blocks, SymInt block_size, Tensor? threshold) "
      "-> (Tensor positions, Tensor counts)");
  // Rows of a matrix with these norms [M] that stand for all of them: int32 and float32 [min(k, M)], by uniforms [k].
  m.def("sampled_rows(Tensor norms, Tensor uniforms) -> (Tensor rows, Tensor scales)");
  // Losses [C] of logits [C, V], which become scale times their own gradient.
  m.def("cross_entropy_rows_(Tensor(a!) logits, Tensor labels, float scale) -> Tensor");

  // Selection of entries, on sorted unique arrays of int32 or int64.
  // The flat positions of the count largest rows[n] columns[k] but for those excluded: int64 [count], sorted.
  m.def("outer_product_topk(Tensor rows, Tensor columns, int count, Tensor exclude) -> Tensor");
  // Entries of dy^T x of magnitude >= threshold, in order: positions int64 [capacity], values [capacity] in the
  // accumulation dtype, count int64 [1], which may exceed the capacity; then, and behind the last, contents are
  // unspecified.
  m.def(
      "product_above(Tensor grad_out, Tensor x, float threshold, int capacity) -> (Tensor positions, Tensor values, "
      "Tensor count)");
  // Two arrays [n] and [m] without a common element as one, and from where in cat(first, second) each came: int64.
  m.def("sorted_merge(Tensor first, Tensor second) -> (Tensor merged, Tensor source)");
  // Which of indices [n] occur in other: bool [n].
  m.def("sorted_contains(Tensor indices, Tensor other) -> Tensor");

  // The delta algebra. A delta in one tensor of `numel` elements: values [nnz] at sorted, unique, flat indices [nnz];
  // without indices (shape [0]) at every position. Keys are bit patterns of magnitudes, of float64 where wide.
  // counts [2^bits] += how many keys with these upper bits fall into each bin.
  m.def("delta_count_keys_(Tensor(a!) counts, Tensor values, bool wide, int shift, int bits, int prefix) -> ()");
  // Which values lie behind the top that ends at the first cut and within that of the last one -> bool [nnz].
  m.def(
      "delta_magnitude_mask(Tensor values, bool wide, int first_key, int first_ties, int last_key, int last_ties) "
      "-> Tensor");
  // Which values have ranks [first, last) by magnitude (times factors [columns]) in their row -> bool [nnz].
  m.def(
      "delta_row_mask(Tensor indices, Tensor values, Tensor? factors, int columns, bool wide, int first, int last) "
      "-> Tensor");
  // The dropout mask of [rows, columns] at the entries -> bool [nnz].
  m.def("delta_random_mask(Tensor indices, Tensor values, int columns, float dropout_p, Tensor rng_state) -> Tensor");
  // Indices, and values times factor, where mask [nnz] holds.
  m.def("delta_compact(Tensor indices, Tensor values, Tensor mask, float factor) -> (Tensor, Tensor)");
  // Merged indices and values of several deltas: weighted sum; trimmed, elected and averaged (TIES).
  m.def(
      "delta_sum(Tensor[] indices, Tensor[] values, float[] weights, int numel, ScalarType dtype) "
      "-> (Tensor, Tensor)");
  m.def(
      "delta_ties(Tensor[] indices, Tensor[] values, float[] weights, int numel, ScalarType dtype) "
      "-> (Tensor, Tensor)");
  // Parameter competition balancing: counts [deltas, 2^bits] of scores and the largest [deltas]; the merge by scores.
  // competition [deltas, 5] float64: lowest and highest magnitude, threshold and largest of the scores, weight.
  m.def(
      "delta_count_scores_(Tensor(a!) counts, Tensor(b!) largest, Tensor[] indices, Tensor[] values, "
      "Tensor competition, int numel, int shift, int bits, int[] prefixes) -> ()");
  m.def(
      "delta_compete(Tensor[] indices, Tensor[] values, Tensor competition, int numel, ScalarType dtype) "
      "-> (Tensor, Tensor)");
}
