"""How refusals begin, in the languages that most models are asked in.

The lists are ours: an apology, "I cannot", and "as an AI", in the words with which chat models begin a refusal. The English openings are
wide ("as a" begins many ordinary texts as well); in other languages an opening goes on until it is clear: "als KI" is also how the German
"als Kind" begins. No list is complete, and a refusal in another language passes.
"""

from raysim.data.words import fold

OPENINGS: dict[str, tuple[str, ...]] = {
    "English": ("as a ", "as an ", "sorry", "i'm sorry", "i am sorry", "i cannot", "i can't"),
    "Arabic": ("عذرا", "آسف", "أنا آسف", "نعتذر", "أعتذر", "لا أستطيع", "لا يمكنني", "بصفتي نموذج", "بصفتي ذكاء", "كنموذج لغوي"),
    "Bengali": ("দুঃখিত", "আমি দুঃখিত", "ক্ষমা করবেন", "আমি পারব না", "একটি এআই"),
    "Chinese": (
        *(
            "对不起",
            "抱歉",
            "很抱歉",
            "非常抱歉",
            "我很抱歉",
            "不好意思",
            "我无法",
            "我不能",
            "作为一个人工智能",
            "作为一个ai",
            "作为一名ai",
        ),
        *("作为ai", "作为人工智能", "作为一个语言模型", "對不起", "我無法", "作為一個人工智", "作為ai", "作為一個ai"),
    ),
    "Dutch": ("sorry", "het spijt me", "helaas kan ik", "ik kan niet", "ik kan dat niet", "ik kan je niet", "als ai", "als taalmodel"),
    "French": (
        *("désolé", "je suis désolé", "je m'excuse", "je regrette", "je ne peux pas", "je ne suis pas en mesure", "en tant qu'ia"),
        *("en tant qu'intelligence", "en tant que modèle"),
    ),
    "German": (
        *("es tut mir leid", "tut mir leid", "entschuldigung", "leider kann ich", "ich kann nicht", "ich kann das nicht"),
        *("ich kann ihnen nicht", "ich kann dir nicht", "als ki ", "als ki-", "als künstliche intelligenz", "als sprachmodell"),
    ),
    "Greek": ("λυπάμαι", "συγγνώμη", "ζητώ συγγνώμη", "δεν μπορώ", "ως τεχνητή νοημοσύνη", "ως γλωσσικό μοντέλο"),
    "Hebrew": ("מצטער", "אני מצטער", "סליחה", "אינני יכול", "איני יכול", "אני לא יכול", "כמודל שפה", "כבינה מלאכותית"),
    "Hindi": (
        *("क्षमा करें", "माफ़ करें", "माफ़ कीजिए", "माफ कीजिए", "मुझे खेद है", "मुझे माफ", "मैं नहीं कर सकता"),
        *("एक एआई", "एआई के रूप में"),
    ),
    "Indonesian": ("maaf", "mohon maaf", "saya minta maaf", "saya tidak bisa", "saya tidak dapat", "sebagai ai", "sebagai model bahasa"),
    "Italian": ("mi dispiace", "mi scuso", "spiacente", "sono spiacente", "non posso", "come ia,", "come modello linguistico"),
    "Japanese": (
        *("申し訳", "すみません", "ごめんなさい", "恐れ入りますが", "お答えできません", "私にはできません", "aiとして", "私はaiなので"),
        *("人工知能として", "言語モデルとして"),
    ),
    "Korean": ("죄송", "미안", "저는 할 수 없", "할 수 없습니다", "저는 ai", "ai로서", "ai 언어 모델", "인공지능으로서", "인공지능 언어"),
    "Persian": ("متأسفم", "متأسفانه نمی", "ببخشید", "عذر می‌خواهم", "نمی‌توانم", "نمی توانم", "من نمی‌توانم", "به عنوان یک هوش"),
    "Polish": ("przepraszam", "przykro mi", "niestety nie mogę", "nie mogę", "jako ai", "jako sztuczna", "jako model językowy"),
    "Portuguese": (
        *("desculpe", "me desculpe", "peço desculpa", "sinto muito", "lamento", "não posso", "não consigo", "como uma ia", "como ia,"),
        *("como um modelo de ling", "como uma inteligência"),
    ),
    "Russian": (
        *(
            "извините",
            "простите",
            "прошу прощения",
            "мне жаль",
            "мне очень жаль",
            "к сожалению, я",
            "я не могу",
            "как ии",
            "как языковая модель",
        ),
        *("как искусственный интеллект", "будучи языковой моделью"),
    ),
    "Spanish": (
        *("lo siento", "lo lamento", "lamento", "disculpa", "perdón", "no puedo", "como ia,", "como una ia", "como modelo de leng"),
        *("como un modelo de leng", "como inteligencia artificial", "como una inteligencia"),
    ),
    "Thai": ("ขออภัย", "ขอโทษ", "ฉันไม่สามารถ", "ผมไม่สามารถ", "ในฐานะ ai", "ในฐานะปัญญา", "ในฐานะโมเดล"),
    "Turkish": (
        "üzgünüm",
        "maalesef",
        "özür dilerim",
        "kusura bakma",
        "yapamam",
        "bir yapay zeka",
        "yapay zeka olarak",
        "bir dil modeli olarak",
    ),
    "Ukrainian": ("вибачте", "перепрошую", "мені шкода", "на жаль, я", "я не можу", "як мовна модель", "як ші", "як штучний інтелект"),
    "Vietnamese": ("xin lỗi", "tôi xin lỗi", "tôi rất tiếc", "rất tiếc", "tôi không thể", "là một mô hình", "là một ai", "với tư cách là"),
}
_FOLDED = tuple(fold(opening) for openings in OPENINGS.values() for opening in openings)


def is_refusal(text: str) -> bool:
    """Whether a text begins as a refusal does, in any of the languages of `OPENINGS`, whatever its case and Unicode form."""
    return fold(text).lstrip("¡").startswith(_FOLDED)
