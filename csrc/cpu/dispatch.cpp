// Every launcher of kernels.h, passed on to the object of the chosen instruction set (see isa.h).
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "kernels.h"

// All there is to add for a new kernel is its line here: in the second list where it gains from instructions for
// bfloat16 and int8, which the objects of the first are not compiled with.
#define BERTFAST_KERNELS(KERNEL)                                     \
    KERNEL(int64_t, embed_layer_norm_fwd, EmbedLayerNorm)            \
    KERNEL(void, embed_layer_norm_bwd, EmbedLayerNormBackward)       \
    KERNEL(void, residual_layer_norm_fwd, ResidualLayerNorm)         \
    KERNEL(void, residual_layer_norm_bwd, ResidualLayerNormBackward) \
    KERNEL(void, bias_gelu_fwd, BiasGelu)                            \
    KERNEL(void, bias_gelu_bwd, BiasGeluBackward)                    \
    KERNEL(void, operand_fwd, OperandOf)
#define BERTFAST_PRODUCTS(KERNEL)                               \
    KERNEL(void, varlen_attention_fwd, VarlenAttention)         \
    KERNEL(void, varlen_attention_bwd, VarlenAttentionBackward) \
    KERNEL(void, gemm_fwd, Gemm)

#define BERTFAST_DECLARE(Result, name, Arguments) Result name(const Arguments&, int threads);
#define BERTFAST_MEMBER(Result, name, Arguments) Result (*name)(const Arguments&, int threads);
#define BERTFAST_ADDRESS(Result, name, Arguments) name,
#define BERTFAST_AVX512(Result, name, Arguments) avx512::name,
#define BERTFAST_FORWARD(Result, name, Arguments) \
    Result name(const Arguments& arguments, int threads) { return chosen()->name(arguments, threads); }

namespace bertfast {
namespace {

struct Kernels {
    const char* isa;
    BERTFAST_KERNELS(BERTFAST_MEMBER)
    BERTFAST_PRODUCTS(BERTFAST_MEMBER)
};

}  // namespace

#define BERTFAST_COMPLETE(ISA)                                                                                  \
    namespace ISA {                                                                                             \
    BERTFAST_KERNELS(BERTFAST_DECLARE)                                                                          \
    BERTFAST_PRODUCTS(BERTFAST_DECLARE)                                                                         \
    static const Kernels kernels = {#ISA, BERTFAST_KERNELS(BERTFAST_ADDRESS) BERTFAST_PRODUCTS(BERTFAST_ADDRESS)}; \
    }
#define BERTFAST_EXTENDED(ISA)                                                                                 \
    namespace ISA {                                                                                            \
    BERTFAST_PRODUCTS(BERTFAST_DECLARE)                                                                        \
    static const Kernels kernels = {#ISA, BERTFAST_KERNELS(BERTFAST_AVX512) BERTFAST_PRODUCTS(BERTFAST_ADDRESS)}; \
    }

#if defined(__x86_64__)
BERTFAST_COMPLETE(avx512)
BERTFAST_EXTENDED(avx512_vnni)
BERTFAST_EXTENDED(avx512_bf16)
BERTFAST_COMPLETE(avx2)
#endif
BERTFAST_COMPLETE(baseline)

namespace {

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> result;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        const bool has_vnni = __builtin_cpu_supports("avx512vnni");
        if (has_vnni && __builtin_cpu_supports("avx512bf16")) result.push_back(&avx512_bf16::kernels);
        if (has_vnni) result.push_back(&avx512_vnni::kernels);
        result.push_back(&avx512::kernels);
    }
    if (has_avx2) result.push_back(&avx2::kernels);
#endif
    result.push_back(&baseline::kernels);
    return result;
}

std::atomic<const Kernels*>& chosen_slot() {
    static std::atomic<const Kernels*> slot{available().front()};
    return slot;
}

const Kernels* chosen() { return chosen_slot().load(std::memory_order_relaxed); }

}  // namespace

std::string isa() { return chosen()->isa; }

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available()) names.push_back(kernels->isa);
    return names;
}

void set_isa(const std::string& name) {
    std::string choices;
    for (const Kernels* kernels : available()) {
        if (name == kernels->isa) return chosen_slot().store(kernels);
        choices += (choices.empty() ? "" : ", ") + std::string(kernels->isa);
    }
    throw std::invalid_argument("instruction set \"" + name + "\" is not available here; choose one of: " + choices);
}

BERTFAST_KERNELS(BERTFAST_FORWARD)
BERTFAST_PRODUCTS(BERTFAST_FORWARD)

}  // namespace bertfast
